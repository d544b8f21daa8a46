"""Reference log-probabilities, computed once before DPO and kept in OUT."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jalign import data, sharding
from jalign.data import PreferenceExample
from jalign.models import Model
from jalign.train.forward import make_reference_fn
from jalign.train.inputs import examples_digest, params_digest

PyTree = Any
_log = logging.getLogger("jalign.train")


def reference_examples(
    model: Model,
    params: PyTree,
    sets: Mapping[str, Sequence[PreferenceExample]],
    *,
    batch_size: int,
    max_length: int,
    cache: Path | None = None,
) -> dict[str, list[PreferenceExample]]:
    """The examples with their log-probabilities under the reference filled in.

    Args:
      model, params: the frozen reference.
      sets: name -> pairs, for example train and eval.
      batch_size: pairs of a forward pass, over all devices.
      max_length: longest padded length.
      cache: a .npz file. It is used if it was made from the same parameters and
        tokens, and (re)written otherwise. With several processes it is not used.

    Returns: name -> pairs with ref_chosen_logp and ref_rejected_logp in nats.
    """
    if jax.process_count() > 1:
        cache = None  # only one of them may see the file
    mark = _mark(params, sets) if cache else ""
    logps = _read(cache, mark) if cache else None
    if logps is None:
        _log.info("reference log-probs of %d pairs", sum(map(len, sets.values())))
        logps = {
            name: reference_logps(
                model, params, pairs, batch_size=batch_size, max_length=max_length
            )
            for name, pairs in sets.items()
        }
        if cache:
            _write(cache, mark, logps)
    return {
        name: [
            pair._replace(ref_chosen_logp=float(c), ref_rejected_logp=float(r))
            for pair, (c, r) in zip(pairs, logps[name], strict=True)
        ]
        for name, pairs in sets.items()
    }


def reference_logps(
    model: Model,
    params: PyTree,
    pairs: Sequence[PreferenceExample],
    *,
    batch_size: int,
    max_length: int,
) -> np.ndarray:
    """float32 [len(pairs), 2], nats: log p of chosen and rejected completion."""
    index, count = sharding.process_slice(model.mesh)
    # By length, so that few rows are padded far; the order is undone below.
    order = sorted(range(len(pairs)), key=lambda i: data.example_length(pairs[i]))
    batches = data.make_eval_loader(
        [pairs[i] for i in order],
        batch_size=batch_size,
        collate=data.collate_preferences,
        max_length=max_length,
        shard_index=index,
        shard_count=count,
    )
    reference = make_reference_fn(model)
    found = [
        sharding.gather(reference(params, sharding.put_batch(batch, model.mesh)))
        for batch in batches
    ]
    result = np.empty((len(pairs), 2), np.float32)
    # Of each batch (chosen, rejected), both [batch_size, 1].
    result[order] = np.concatenate([np.hstack(both) for both in found])[: len(pairs)]
    return result


def _mark(params: PyTree, sets: Mapping[str, Sequence[PreferenceExample]]) -> str:
    """A digest of everything that the log-probabilities depend on."""
    digests = {name: examples_digest(pairs) for name, pairs in sets.items()}
    return json.dumps({"params": params_digest(params)} | digests)


def _read(cache: Path, mark: str) -> dict[str, np.ndarray] | None:
    try:
        with np.load(cache, allow_pickle=False) as file:
            if str(file["mark"]) == mark:
                return {name: file[name] for name in file.files if name != "mark"}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError) as error:
        _log.warning("%s cannot be read (%s): computing it anew", cache, error)
    return None


def _write(cache: Path, mark: str, logps: Mapping[str, np.ndarray]) -> None:
    partial = cache.with_suffix(".tmp")
    with open(partial, "wb") as file:
        arrays: dict[str, Any] = {"mark": np.array(mark), **logps}
        np.savez(file, **arrays)
    os.replace(partial, cache)

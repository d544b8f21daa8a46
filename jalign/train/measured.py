"""Passes that only measure: held-out figures, sample texts, and the reference's
log-probabilities, computed once before DPO and kept in OUT."""

import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jalign import data, evaluate, forward, sharding
from jalign.data import PreferenceExample
from jalign.data.batching import in_multiples
from jalign.data.examples import encode_prompt_rows
from jalign.models import Model
from jalign.paths import on_disk, written
from jalign.sharding.context import length_multiple
from jalign.train.inputs import examples_digest, params_digest
from jalign.types import PyTree

_log = logging.getLogger("jalign.train")

NUM_SAMPLES = 4
SAMPLE_TOKENS = 64
# Prompts for samples are short enough to be read, and quick to continue.
_PROMPT_TOKENS = 256


def measured_batches(
    mesh: Mesh | None,
    examples: Sequence[Any],
    *,
    collate: Callable[[Any, int], Any],
    batch_size: int,
    max_length: int,
) -> tuple[np.ndarray, Iterator[Any]]:
    """Every example once, in batches of one shape, packed where that saves work.

    Args:
      mesh: of the model.
      examples: all of them, the same on every process.
      collate, max_length: as in data.make_eval_loader.
      batch_size: examples of a batch, over all devices.

    Returns: the order in which the examples come, int64 [n], and this process's rows
      of the batches.
    """
    parts = sharding.batch_parts(mesh)
    index, count = sharding.process_slice(mesh)
    order = data.balanced_order(examples, -(-batch_size // parts))
    batches = data.make_eval_loader(
        [examples[i] for i in order],
        batch_size=batch_size,
        collate=in_multiples(collate, length_multiple(mesh, max_length)),
        max_length=max_length,
        pack_rows=parts,
        shard_index=index,
        shard_count=count,
    )
    return order, batches


def measure(
    fn: Callable[[Model, PyTree, Any], dict[str, float]],
    model: Model,
    params: PyTree,
    examples: Sequence[Any] | None,
    *,
    batch_size: int,
    collate: Callable[[Any, int], Any],
    max_length: int,
) -> dict[str, float]:
    """fn's figures over all examples, each once; {} if there are none.

    Args:
      fn: (model, params, batches of this process's rows) -> figures.
      batch_size: rows of a batch, over all devices.
      collate, max_length: as in data.make_eval_loader.
    """
    if not examples:
        return {}
    how = {"collate": collate, "batch_size": batch_size, "max_length": max_length}
    _, batches = measured_batches(model.mesh, examples, **how)
    return fn(model, params, batches)


def sample_prompts(
    rows: Sequence[dict], tokenizer: Any, columns: str | None = None
) -> list[data.PromptExample]:
    """The first few prompts of the rows; none where they have none."""
    first = list(rows[: 8 * NUM_SAMPLES])
    found, bad = encode_prompt_rows(first, tokenizer, columns, quiet=True)
    short = [prompt for prompt in found if len(prompt.tokens) <= _PROMPT_TOKENS]
    if not short:
        why = bad[0].reason if bad else f"all are longer than {_PROMPT_TOKENS} tokens"
        _log.info("no sample texts in the report, of the prompts: %s", why)
    return short[:NUM_SAMPLES]


def sample_texts(
    model: Model, params: PyTree, tokenizer: Any, prompts: Sequence[data.PromptExample]
) -> list[str]:
    """How the model continues the prompts, greedily; [] for a reward model."""
    if model.config.num_labels or not prompts:
        return []
    return evaluate.sample_texts(
        model,
        params,
        tokenizer,
        list(prompts),
        key=jax.random.key(0),
        max_new_tokens=SAMPLE_TOKENS,
        temperature=0.0,
    )


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
        # All sets at once, so that their batches have one shape.
        pairs = [pair for found in sets.values() for pair in found]
        how = {"batch_size": batch_size, "max_length": max_length}
        ends = np.cumsum([len(found) for found in sets.values()])
        both = np.split(reference_logps(model, params, pairs, **how), ends[:-1])
        logps = dict(zip(sets, both, strict=True))
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
    how = {"batch_size": batch_size, "max_length": max_length}
    collate = data.collate_preferences
    order, batches = measured_batches(model.mesh, pairs, collate=collate, **how)
    result = np.empty((len(pairs), 2), np.float32)
    found = []
    for batch in batches:
        placed = sharding.put_batch(batch, model.mesh)
        *both, valid = sharding.gather(_reference_pass(params, placed, model=model))
        found.append(np.stack(both, axis=-1)[valid])  # [B, P, 2] without its filler
    result[order] = np.concatenate(found)
    return result


def _words(params, batch, *, model) -> str:
    return sharding.batch_words("the reference's pass", batch)


@functools.partial(sharding.announced, words=_words, static_argnames="model")
def _reference_pass(params, batch, *, model):
    """(chosen, rejected) float32 [B, P], nats, and which are no filler, bool [B, P]."""
    logps = forward.pair_logps(model, params, batch)
    return *logps, forward.valid_pairs(batch)


def _mark(params: PyTree, sets: Mapping[str, Sequence[PreferenceExample]]) -> str:
    """A digest of everything that the log-probabilities depend on."""
    digests = {name: examples_digest(pairs) for name, pairs in sets.items()}
    return json.dumps({"params": params_digest(params)} | digests)


def _read(cache: Path, mark: str) -> dict[str, np.ndarray] | None:
    try:
        with on_disk(cache) as here, np.load(here, allow_pickle=False) as file:
            if str(file["mark"]) == mark:
                return {name: file[name] for name in file.files if name != "mark"}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError) as error:
        _log.warning("%s cannot be read (%s): computing it anew", cache, error)
    return None


def _write(cache: Path, mark: str, logps: Mapping[str, np.ndarray]) -> None:
    with written(cache) as here, here.open("wb") as file:
        arrays: dict[str, Any] = {"mark": np.array(mark), **logps}
        np.savez(file, **arrays)

"""What a run depends on beside its settings: weights, rows, tokenizers, rewards, time.

Each is digested once, stored with every checkpoint, and compared when the run goes on.
So a file may move, and may not change: contents count, not paths.
"""

import functools
import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jalign import rewards, sharding
from jalign.paths import located
from jalign.pretrained import Opened, Pretrained
from jalign.rewards.terms import is_function, single_sources
from jalign.settings import as_text
from jalign.train.integrity import tree_digest, tree_specs
from jalign.train.optim import depends_on_length
from jalign.types import PyTree

_log = logging.getLogger("jalign.train")
Inputs = dict[str, str]
"""What it is, in words for a message -> its digest or value."""
STEPS, REWARD = "the number of steps", "the reward"
WEIGHTS, HELD_OUT = "the model's weights", "the held-out rows"
_SCHEDULE_ADVICE = (
    ", on which the learning rates depend: with --reschedule the steps that are left "
    "follow the new schedule"
)


def params_digest(params: PyTree) -> str:
    """Of weights, whatever mesh they lie on. Collective: every process calls it.

    Raises: ValueError where processes differ in names, shapes or dtypes.
    """
    sharding.agree("the weights", tree_specs(params))
    return _hash(json.dumps(tree_digest(params), sort_keys=True))


def examples_digest(examples: Iterable[Any]) -> str:
    """Of examples in their order: token ids, masks, numbers, and the rows of prompts.

    Of a value that is no text, number, list or dict (an image), the type alone counts.
    """
    sha = hashlib.sha256()
    for example in examples:
        _feed(sha, example)
    return sha.hexdigest()[:16]


def _feed(sha: Any, value: Any) -> None:
    if isinstance(value, np.ndarray):
        sha.update(f"{value.dtype.str}{value.shape}".encode())
        sha.update(value.tobytes())
    elif isinstance(value, dict):
        _feed(sha, sorted(value.items(), key=lambda item: repr(item[0])))
    elif isinstance(value, list | tuple):
        sha.update(f"({len(value)}".encode())
        for part in value:
            _feed(sha, part)
    elif isinstance(value, np.generic):
        _feed(sha, value.item())
    elif isinstance(value, str | int | float | bool | None):
        sha.update(f"{value!r},".encode("utf-8", "surrogatepass"))
    else:
        sha.update(f"<{type(value).__name__}>".encode())


def tokenizer_inputs(tokenizer: Any, whose: str = "the model's") -> Inputs:
    """A tokenizer's and its chat template's digests. Call it before it encodes: the
    default template is not the file's."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    # A call's, and left behind by it.
    settings |= {"truncation": None, "padding": None}
    tokens = {name: str(t) for name, t in tokenizer.special_tokens_map.items()}
    return {
        f"{whose} tokenizer": _hash(json.dumps([settings, tokens], sort_keys=True)),
        f"{whose} chat template": _hash(repr(tokenizer.chat_template)),
    }


def reward_inputs(
    terms: Sequence[rewards.RewardTerm], reward_models: Sequence[Pretrained | None]
) -> Inputs:
    """The sum that a --reward stands for, and what is behind each of its sources.

    Args:
      terms: of parse_rewards.
      reward_models: behind each of their single sources; None for a function.
    """
    found, told = {}, {}
    leaves = zip(single_sources(terms), reward_models, strict=True)
    for number, (leaf, reward_model) in enumerate(leaves, 1):
        whose = f"reward {number}'s"
        told[leaf.name] = "checkpoint" if reward_model else leaf.name
        if reward_model:
            found[f"{whose} weights"] = params_digest(reward_model.params)
            found |= tokenizer_inputs(reward_model.tokenizer, whose)
        elif not isinstance(leaf.source, str):
            found[f"{whose} function"] = function_digest(leaf.source)
        elif is_function(leaf.source):
            file = located(leaf.source.rpartition(":")[0])
            found[f"{whose} file"] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]

    def text(term: rewards.RewardTerm) -> str:
        if term.ensemble is None:
            return told[term.name]
        members = [m._replace(name=told[m.name]) for m in term.ensemble.members]
        return f"({term.ensemble._replace(members=tuple(members))})"

    parts = [f"{term.weight:g}*{text(term)}" for term in terms]
    return {REWARD: " + ".join(parts)} | found


def function_digest(function: Callable) -> str:
    """Of a Python function: its source where that can be had, else its full name.

    What it closes over or calls does not count; the arguments of a partial do.
    """
    bound = []
    while isinstance(function, functools.partial):
        bound.append((function.args, function.keywords))
        function = function.func
    target: Any = function if inspect.isroutine(function) else type(function)
    try:
        text = inspect.getsource(target)
    except (OSError, TypeError):  # typed at a prompt, or compiled
        text = f"{target.__module__}.{target.__qualname__}"
    return examples_digest([text, bound])


def rows_inputs(config: Any, examples: list, steps: int) -> Inputs:
    """The training examples, and the number of steps where the learning rate of a
    step depends on it."""
    found = {"the training rows": examples_digest(examples)}
    return found | ({STEPS: str(steps)} if depends_on_length(config.optim) else {})


def agree_before_loading(opened: Opened, inputs: Inputs, held_out: str) -> None:
    """Stops all processes where one has read something else than another.

    Before the weights: whoever has other shapes would compile another program, and
    each would wait for the other's part of it.

    Args:
      opened: the model's checkpoint.
      inputs: what is known of them.
      held_out: digest of the rows that are measured only.

    Raises: ValueError as sharding.agree.
    """
    model = as_text(opened.config)
    sharding.agree("the data or the model", inputs | {HELD_OUT: held_out} | model)


def changes(
    old: Mapping[str, str] | None, new: Inputs, *, reschedule: bool = False
) -> list[str]:
    """How the inputs differ from those of a checkpoint, in words.

    Args:
      old: as stored; None in a checkpoint of an older jalign, which goes on with a
        warning of what nobody can compare.
      new: the run's.
      reschedule: whether the number of steps may be another.
    """
    if old is None:
        _log.warning(
            "the checkpoint is of an older jalign: whether it was made with the same "
            "%s cannot be checked",
            ", ".join(name.removeprefix("the ") for name in new),
        )
        return []
    found = []
    for name in dict.fromkeys([*old, *new]):
        before, after = (side.get(name, "absent") for side in (old, new))
        if before == after or (name == STEPS and reschedule):
            continue
        told = name in (STEPS, REWARD) or "absent" in (before, after)
        text = f"{name} was {before} and is {after}" if told else f"{name} changed"
        found.append(text + (_SCHEDULE_ADVICE if name == STEPS else ""))
    return found


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]

"""Which split a file belongs to, by its name and the folders that it lies in."""

import re
from collections.abc import Sequence
from pathlib import Path

from jalign.data.files import base_name

_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
}
_CANONICAL = {word: name for name, words in _NAMES.items() for word in words}
# As `datasets` names what it pushes; the name of a split holds no other signs.
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")

HELD_OUT = ("test", "validation")
"""For `load_rows(split=...)`: the first of these that there is, never "train"."""


def named_splits(name: str) -> set[str]:
    """The splits that the words of a name stand for: "x_train.v2" for {"train"}."""
    words = re.split(r"[^a-z]+", name.lower())
    return {_CANONICAL[word] for word in words if word in _CANONICAL}


def canonical(split: str) -> str:
    """ "val" and the like as the name that `datasets` uses; others as they are."""
    return _CANONICAL.get(split, split)


def split_of(file: Path, asked: Sequence[str] = ()) -> str | None:
    """The split of a file, of which the path below the source is given; None if it
    names none.

    Args:
      file: relative path; folders count as the file's own name does.
      asked: splits asked for: a name that is one of these is that one, whatever it
        is ("train_sft" is not a word of "train" then).

    Raises: ValueError if the path names several.
    """
    name = base_name(file)
    shard = _SHARD.fullmatch(name)
    if shard:
        last = re.split(r"[._]", shard[1])[-1]
        return shard[1] if shard[1] in asked else _CANONICAL.get(last, shard[1])
    parts = [*file.parent.parts, name]
    found = {part for part in parts if part in asked and part not in _CANONICAL}
    found = found or set().union(*map(named_splits, parts))
    if len(found) > 1:
        raise ValueError(
            f"{file}: its path names the splits {' and '.join(sorted(found))}; rename "
            "it, or give the files themselves, with commas between them"
        )
    return found.pop() if found else None

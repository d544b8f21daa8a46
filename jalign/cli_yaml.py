"""A `--config FILE.yaml` as flags, which stand before the user's own."""

from typing import Any

from jalign.paths import located
from jalign.settings import nearest


def expand_yaml(args: list[str], known: set[str]) -> list[str]:
    """Replaces `--config FILE` by the file's entries, written as flags, in front."""
    before, rest, words = [], [], iter(args)
    for word in words:
        head, equals, path = word.partition("=")
        if head != "--config":
            rest.append(word)
            continue
        if not equals and (path := next(words, None)) is None:
            raise ValueError("--config needs a file: --config FILE.yaml")
        before += yaml_flags(path, known)
    return before + rest


def yaml_flags(path: str, known: set[str]) -> list[str]:
    """The entries of a flat YAML mapping as flags; unknown and double keys raise."""
    import yaml

    text = located(path).read_text(encoding="utf-8")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        entries = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: expected `name: value` lines, one for each option")
    keys = [str(key.value) for key, _ in node.value] if node else []
    flags: list[str] = []
    for key in keys:
        name = key.replace("-", "_")
        if keys.count(key) > 1:
            raise ValueError(f"{path}: {key!r} is given twice")
        if name not in known:
            raise ValueError(f"{path}: unknown key {key!r}{nearest(name, known)}")
        flags += flag_of(name, entries[key], path)
    return flags


def flag_of(name: str, value: Any, path: str) -> list[str]:
    """One YAML entry as command-line words."""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag[2:]]
    if isinstance(value, dict):
        raise ValueError(f"{path}: {name!r} is a mapping; options are flat")
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [flag, str(value)]

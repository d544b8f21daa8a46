"""Settings of a run: the bounds of numbers, the flat names of flags, a text to read.

A config is a frozen dataclass with others inside, `DPOConfig(model=..., optim=
OptimConfig(learning_rate=...))`; on the command line and in `run_dpo(model=...,
learning_rate=...)` it is flat, since no name is there twice.
"""

import dataclasses
import difflib
import operator
import typing
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any, TypeVar

Config = TypeVar("Config")
_HOLDS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


def number(default: Any, *bounds: str, why: str = "") -> Any:
    """A field of a Checked config with its bounds, as in number(0.9, ">= 0", "< 1").

    Args:
      default: None is an option that is unset, and within all bounds.
      bounds: the lower one, and then the upper one where there is one.
      why: said after the message.
    """
    after = f": {why}" if why else ""
    return dataclasses.field(default=default, metadata={"bounds": (bounds, after)})


@dataclasses.dataclass(frozen=True)
class Checked:
    """A config whose numbers keep to the bounds beside their defaults.

    What fields say to each other is checked by the subclass, in __post_init__.
    """

    def __post_init__(self):
        for field in dataclasses.fields(self):
            bounds, after = field.metadata.get("bounds", ((), ""))
            check_bounds(field.name, getattr(self, field.name), bounds, after)


def check(ok: bool, message: str) -> None:
    """Raises ValueError with the message unless ok."""
    if not ok:
        raise ValueError(message)


def check_bounds(name: str, value: Any, bounds: Iterable[str], after: str = "") -> None:
    """Raises ValueError for a number out of its bounds; None is within all."""
    parts = [bound.split(maxsplit=2) for bound in bounds]
    if value is None or all(_HOLDS[sign](value, float(x)) for sign, x, *_ in parts):
        return
    said = next(iter(bounds))
    if len(parts) == 2:
        (low, start), (high, end) = parts
        left, right = "[" if low == ">=" else "(", "]" if high == "<=" else ")"
        said = f"in {left}{start}, {end}{right}"
    raise ValueError(f"{name} must be {said}, got {value}{after}")


def flags_of(config_class: Any) -> dict[str, Any]:
    """Flat field name -> type, nested config dataclasses opened."""
    flat = {}
    for name, kind in _kinds(config_class).items():
        flat |= flags_of(kind) if dataclasses.is_dataclass(kind) else {name: kind}
    return flat


def required(config_class: Any) -> list[str]:
    """The fields without a default."""
    return [
        field.name
        for field in dataclasses.fields(config_class)
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]


def settings_or(
    config_class: type[Config], config: Config | None, settings: Mapping[str, Any]
) -> Config:
    """A run's config, given as one or made of flat settings.

    Args:
      config_class: of the recipe.
      config: None takes the settings.
      settings: flat field name -> value; what is left out has its default.

    Raises: ValueError for both, for a config of another recipe, for an unknown name
      (with the nearest one), or a missing one; and what the config raises.
    """
    name = config_class.__name__
    if config is None:
        return _made(config_class, settings)
    if settings:
        raise ValueError(
            f"a {name} and settings beside it ({', '.join(settings)}): give one, or "
            "change the config by dataclasses.replace"
        )
    if not isinstance(config, config_class):
        raise ValueError(f"expected a {name}, got {type(config).__name__}")
    return config


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the nearest known name, or nothing."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def as_text(config: Any) -> Any:
    """A config as nested dicts of plain values, for reports and records.

    Rows and functions are said in words ("128 rows in memory") and not copied, as
    `dataclasses.asdict` would.
    """
    if dataclasses.is_dataclass(config):
        fields = dataclasses.fields(config)
        return {field.name: as_text(getattr(config, field.name)) for field in fields}
    if callable(config):
        return f"{getattr(config, '__name__', type(config).__name__)} (in Python)"
    if isinstance(config, tuple) or (isinstance(config, list) and _is_plain(config)):
        return tuple(map(as_text, config))
    if isinstance(config, Mapping):
        parts = (f"{name}: {as_text(rows)}" for name, rows in config.items())
        return "; ".join(parts)
    if config is None or isinstance(config, str | int | float | PurePath):
        return config
    if hasattr(config, "__len__"):
        return f"{len(config)} rows in memory"
    return f"a {type(config).__name__}"


def _is_plain(values: list) -> bool:
    return not any(isinstance(value, Mapping) for value in values[:1])


def _kinds(config_class: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(config_class)
    return {f.name: hints[f.name] for f in dataclasses.fields(config_class)}


def _made(config_class: Any, settings: Mapping[str, Any]) -> Any:
    known = flags_of(config_class)
    for name in settings:
        if name not in known:
            raise ValueError(f"unknown setting {name!r}{nearest(name, known)}")
    missing = [name for name in required(config_class) if name not in settings]
    if missing:
        raise ValueError(f"{config_class.__name__} needs {', '.join(missing)} as well")
    return nested(config_class, settings)


def nested(config_class: Any, settings: Mapping[str, Any]) -> Any:
    """The config with each setting in the dataclass that has it; others are ignored."""
    given = {}
    for name, kind in _kinds(config_class).items():
        if name in settings:
            value, is_tuple = settings[name], typing.get_origin(kind) is tuple
            given[name] = tuple(value) if is_tuple else value
        elif not dataclasses.is_dataclass(kind):
            continue
        elif inner := settings.keys() & flags_of(kind).keys():
            given[name] = nested(kind, {key: settings[key] for key in inner})
    return config_class(**given)

"""Rotary positions in a config.json, both of transformers 4's and 5's spelling."""

from jalign.models.config import ROPE_KINDS, ModelConfig, RopeScaling
from jalign.models.hf_checks import ROPE_CHECKS, check_values
from jalign.models.hf_traits import Trait, Values

# RopeScaling field -> key in config.json, where that is another.
_ROPE_KEYS = {
    "original_max_position": "original_max_position_embeddings",
    "short_factors": "short_factor",
    "long_factors": "long_factor",
}
_YARN = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
_PRETRAINED = ("factor", "original_max_position")
_ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": (*_PRETRAINED, "low_freq_factor", "high_freq_factor"),
    "yarn": (*_PRETRAINED, *_YARN, "truncate"),
    "longrope": (*_PRETRAINED, "short_factors", "long_factors", "attention_factor"),
}


def rope(
    theta: str = "rope_theta", part: str = "", kinds: tuple[str, ...] = ROPE_KINDS[:3]
) -> Trait:
    """Rotary positions: rope_parameters (transformers 5), or keys of their own (4).

    Args:
      theta: key of the base.
      part: key of the share of a head that is rotated; "" where it is all of it.
      kinds: of scaling that the family has.
    """

    def read(values: Values, known: Values) -> Values:
        name = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
        given = values.get(name) or {}
        check_values(given, ROPE_CHECKS, f"{name}.")
        if "full_attention" in given:  # Gemma 3 has two of them
            name, given = f"{name}.full_attention", given["full_attention"] or {}
            check_values(given, ROPE_CHECKS, f"{name}.")
        base = given.get("rope_theta", values.get(theta))
        share = given.get("partial_rotary_factor", values.get(part or "-"))
        if not part and share not in (None, 1.0):
            raise ValueError("partial_rotary_factor other than 1 is not supported")
        fields: Values = {"rope_theta": 10_000.0 if base is None else float(base)}
        if share not in (None, 1.0):
            fields["rotary_dim"] = int(known["head_dim"] * share)
        scaling = _read_scaling(values, given, kinds)
        return fields | {"rope_scaling": scaling}

    def write(c: ModelConfig) -> Values:
        keys: Values = {theta: c.rope_theta, "rope_scaling": _write_scaling(c)}
        if part:
            keys[part] = (c.rotary_dim or c.head_dim) / c.head_dim
        if c.rope_scaling and c.rope_scaling.kind == "longrope":
            length = c.rope_scaling.original_max_position
            keys["original_max_position_embeddings"] = length
        return keys

    return Trait(read, write)


def _read_rotary_dim(values: Values, _: Values) -> Values:
    if values["rotary_dim"] is None:
        raise ValueError("rotary_dim=None is not supported, only a number")
    return {}


# How many dimensions of a head GPT-J rotates: its files always say so.
rotary_dim = Trait(_read_rotary_dim, lambda c: {})


def _read_scaling(values: Values, given: Values, kinds) -> RopeScaling | None:
    kind = given.get("rope_type", given.get("type", "default"))
    if "longrope" in kinds and kind in ("su", "yarn"):
        kind = "longrope"  # as Phi-3's first files call it
    if kind == "default":
        return None
    if kind not in kinds:
        raise ValueError(f"rope type {kind!r} is not supported; known: {kinds}")
    if kind == "longrope":
        given = given | _longrope(values, given)
    if "factor" not in given:
        raise ValueError(f"rope type {kind!r} without a factor")
    fields = {f: given.get(_ROPE_KEYS.get(f, f)) for f in _ROPE_FIELDS[kind]}
    if fields.get("original_max_position", 1) is None:
        fields["original_max_position"] = values["max_position_embeddings"]
    return RopeScaling(kind, **{f: x for f, x in fields.items() if x is not None})


def _longrope(values: Values, given: Values) -> Values:
    """Its factor is the ratio of two lengths, and has no key."""
    key = "original_max_position_embeddings"
    pretrained = values.get(key) or given.get(key) or values["max_position_embeddings"]
    lists: Values = {}
    for name in ("short_factor", "long_factor"):
        numbers = given.get(name)
        if not isinstance(numbers, list) or not all(
            type(x) in (int, float) and x > 0 for x in numbers
        ):
            raise ValueError(f"rope type 'longrope' needs {name}, a list of numbers")
        lists[name] = tuple(map(float, numbers))
    factor = values["max_position_embeddings"] / pretrained
    return {"factor": factor, key: pretrained} | lists


def _write_scaling(c: ModelConfig) -> Values | None:
    scaling = c.rope_scaling
    if scaling is None:
        return None
    fields = {f: getattr(scaling, f) for f in _ROPE_FIELDS[scaling.kind]}
    given = {
        _ROPE_KEYS.get(f, f): list(x) if isinstance(x, tuple) else x
        for f, x in fields.items()
        if x is not None
    }
    if scaling.kind == "longrope":
        del given["factor"], given[_ROPE_KEYS["original_max_position"]]
    return {"rope_type": scaling.kind} | given

"""Sampling from a model: pure token samplers and a jitted decode engine."""

from jalign.generate.engine import (
    completion_lists,
    continuation,
    continuations,
    generate,
    generate_lists,
    lower,
    to_host,
)
from jalign.generate.sampling import greedy, sample, sample_filtered

__all__ = [
    "completion_lists",
    "continuation",
    "continuations",
    "generate",
    "generate_lists",
    "greedy",
    "lower",
    "sample",
    "sample_filtered",
    "to_host",
]

"""What a compiled program holds in memory, read off its text."""

import re

import numpy as np


def largest_buffer(hlo: str) -> int:
    """Elements of the largest array that occurs in a compiled module's text."""
    shapes = re.findall(r"\b(?:f32|bf16|f16|s32|pred)\[([\d,]+)\]", hlo)
    return max(int(np.prod([int(n) for n in s.split(",")])) for s in shapes)


def moved(hlo: str) -> list[tuple[str, int]]:
    """(kind, elements) of every collective in a compiled module's text."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"= \(?\w+\[([\d,]*)\]\S* .*?({kinds})(?:-start)?\(", hlo)
    return [(k, int(np.prod([int(n) for n in s.split(",") if n]))) for s, k in found]

"""What a compiled program holds in memory, read off its text."""

import re

import numpy as np


def largest_buffer(hlo: str) -> int:
    """Elements of the largest array that occurs in a compiled module's text."""
    shapes = re.findall(r"\b(?:f32|bf16|f16|s32|pred)\[([\d,]+)\]", hlo)
    return max(int(np.prod([int(n) for n in s.split(",")])) for s in shapes)

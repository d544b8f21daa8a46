"""Tests for jalign/models/positions.py, against float64 NumPy and published numbers."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jalign.models import ModelConfig, RopeScaling
from jalign.models.positions import (
    alibi_slopes,
    rope_frequencies,
    rope_tables,
    rotate,
)
from tests.models.rows import packed_rows
from tests.models.tiny import CONFIGS, FAMILY_CONFIGS


def slopes(heads, alibi_max=8.0):
    return alibi_slopes(
        ModelConfig(1, heads * 2, 1, 1, heads, heads, 2, alibi_max=alibi_max)
    )


def test_slopes_are_those_of_the_paper():
    """arXiv:2108.12409, section 3: 8 heads from 1/2 to 1/256, 16 between them too."""
    np.testing.assert_array_equal(slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(slopes(16), [2 ** (-i / 2) for i in range(1, 17)])
    # Its authors' code for 6 heads: those of 4, then each other one of 8.
    want = [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]
    np.testing.assert_array_equal(slopes(6), want)


def test_slopes_of_the_largest_bloom():
    """112 heads: 64 of 64, and 48 of those that 128 have between them."""
    of_64 = [2 ** (-8 * i / 64) for i in range(1, 65)]
    between = [2 ** (-4 * (2 * j - 1) / 64) for j in range(1, 49)]
    np.testing.assert_allclose(np.sort(slopes(112)), np.sort(of_64 + between))


@pytest.mark.parametrize("heads", [6, 8, 112])
def test_a_maximum_of_16_squares_the_slopes(heads):
    np.testing.assert_allclose(slopes(heads, 16.0), slopes(heads) ** 2, rtol=1e-6)


def test_rotation_is_by_pairs_half_a_head_apart():
    config = CONFIGS["llama"]
    positions = np.array([[0, 3, 7]])
    x = np.random.default_rng(0).normal(size=(1, 3, 2, 10))
    angle = positions[..., None] * 10_000.0 ** (-np.arange(0, 10, 2) / 10)
    z = (x[..., :5] + 1j * x[..., 5:]) * np.exp(1j * angle)[:, :, None]
    want = np.concatenate([z.real, z.imag], -1)
    cos, sin = rope_tables(config, jnp.asarray(positions))["main"]
    got = rotate(jnp.asarray(x, jnp.float32), cos, sin)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_scaled_frequencies_keep_fast_and_divide_slow_ones():
    plain, _ = rope_frequencies(CONFIGS["llama"])
    linear, _ = rope_frequencies(CONFIGS["linear"])
    np.testing.assert_allclose(linear, plain / 2, rtol=1e-6)
    for name, factor in (("llama3", 8), ("yarn", 4)):
        scaled, _ = rope_frequencies(CONFIGS[name])
        np.testing.assert_allclose(scaled[-1], plain[-1] / factor, rtol=1e-6)
        assert (scaled <= plain * (1 + 1e-6)).all()
    assert rope_frequencies(CONFIGS["yarn"])[1] == pytest.approx(1 + 0.1 * np.log(4))


# Dimension 5 log10(5 / pi) of 10 turns 1,000 times in 10,000 tokens, at a base of 10.
EARLY = 5 * math.log10(5 / math.pi)
LONG = dict(theta=10.0, original_max_position=10_000, beta_fast=1000.0)


@pytest.mark.parametrize(
    "given, first, last",
    [
        # From -1.4 to 0.5, rounded outwards and held at 0; from 1.009 to 16, held at 9.
        (dict(theta=1e4, original_max_position=16), 0, 1),
        (LONG, 1, 9),
        (LONG | dict(truncate=False), EARLY, 9),
        (LONG | dict(truncate=False, beta_slow=1000.0), EARLY, EARLY + 1e-3),
    ],
    ids=["before", "behind", "untruncated", "no width"],
)
def test_yarns_ramp_is_held_to_the_head(given, first, last):
    """YaRN (arXiv:2309.00071), section 3.2, with the bounds of its authors' code."""
    theta, pair = given["theta"], np.arange(5)
    scaling = {name: x for name, x in given.items() if name != "theta"}
    scaled = RopeScaling("yarn", factor=4.0, **scaling)
    config = dataclasses.replace(
        CONFIGS["llama"], rope_theta=theta, rope_scaling=scaled
    )
    divided = np.clip((pair - first) / (last - first), 0, 1)
    want = theta ** (-pair / 5) * (1 - divided + divided / 4)
    np.testing.assert_allclose(rope_frequencies(config)[0], want, rtol=1e-6)


@pytest.mark.parametrize("pairs", [False, True])
def test_a_part_of_a_head_is_rotated(pairs):
    """The first 4 of 10 dimensions, by frequencies of 4; neighbours, or halves."""
    config = dataclasses.replace(CONFIGS["llama"], rotary_dim=4, rotary_pairs=pairs)
    positions = np.array([[0, 3, 7]])
    x = np.random.default_rng(0).normal(size=(1, 3, 2, 10))
    angle = positions[..., None] * 10_000.0 ** (-np.arange(0, 4, 2) / 4)
    first, second = ([0, 2], [1, 3]) if pairs else ([0, 1], [2, 3])
    z = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angle)[:, :, None]
    want = x.copy()
    want[..., first], want[..., second] = z.real, z.imag
    tables = rope_tables(config, jnp.asarray(positions))["main"]
    got = rotate(jnp.asarray(x, jnp.float32), *tables, pairs=pairs)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_array_equal(got[..., 4:], x[..., 4:].astype(np.float32))
    assert rotate(jnp.asarray(x, jnp.bfloat16), *tables).dtype == jnp.bfloat16


def test_longrope_goes_by_the_length_of_each_document():
    """Short factors in documents of up to 8 tokens, long ones in that of 9."""
    config = FAMILY_CONFIGS["phi3"]
    ids, positions = packed_rows([[8, 9, 1], [3, 9, 6]], 19)
    theta = 10_000.0 ** (-np.arange(0, 6, 2) / 6)
    scaling = config.rope_scaling
    assert scaling is not None
    short, long = (theta / f for f in (scaling.short_factors, scaling.long_factors))
    sizes = np.stack([np.bincount(row, minlength=4) for row in ids])
    is_long = (np.take_along_axis(sizes, ids, 1) > 8) & (ids > 0)
    angle = positions[..., None] * np.where(is_long[..., None], long, short)
    factor = math.sqrt(1 + math.log(8) / math.log(8))  # 64 tokens over 8
    cos, sin = rope_tables(config, jnp.asarray(positions), jnp.asarray(ids))["main"]
    np.testing.assert_allclose(cos, factor * np.cos(angle), atol=1e-5)
    np.testing.assert_allclose(sin, factor * np.sin(angle), atol=1e-5)
    # Without segments a row is one document.
    row = jnp.arange(9)[None]
    cos, _ = rope_tables(config, row)["main"]
    want = factor * np.cos(np.arange(9)[:, None] * long)
    np.testing.assert_allclose(cos[0], want, atol=1e-5)


def test_longropes_factor_is_phi3s():
    scaling = dict(original_max_position=4096, short_factors=(1.0,))
    scaling |= dict(long_factors=(2.0,))
    config = dataclasses.replace(CONFIGS["llama"], rotary_dim=2)

    def factor(times, **more):
        scaled = RopeScaling("longrope", factor=times, **scaling | more)
        return rope_frequencies(dataclasses.replace(config, rope_scaling=scaled))[1]

    assert factor(32.0) == pytest.approx(1.190238, abs=1e-6)  # Phi-3's 128k
    assert factor(1.0) == 1 and factor(32.0, attention_factor=1.5) == 1.5


def test_layers_have_tables_by_their_kind():
    config, positions = FAMILY_CONFIGS["gemma3_text"], jnp.arange(5)[None]
    tables = rope_tables(config, positions)
    assert set(tables) == {"main", "local"}
    for name, theta, times in (("main", 1e5, 2), ("local", 1e4, 1)):
        angle = np.arange(5)[:, None] * theta ** (-np.arange(0, 10, 2) / 10) / times
        np.testing.assert_allclose(tables[name][0][0], np.cos(angle), atol=1e-5)
    assert set(rope_tables(FAMILY_CONFIGS["smollm3"], positions)) == {"main"}
    assert not rope_tables(FAMILY_CONFIGS["bloom"], positions)
    assert not rope_tables(FAMILY_CONFIGS["opt"], positions)

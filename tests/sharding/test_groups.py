"""Tests for jalign/sharding/groups.py: the losses of logits on a mesh are those of one
device, and no device holds the whole unembedding or the whole of its gradient."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import losses, sharding
from jalign.losses.chunked import sum_over_logits
from jalign.sharding.groups import embedding_groups, logits_groups

B, T, D, V = 16, 20, 24, 512
MESHES = dict(fsdp=8), dict(fsdp=4, tensor=2), dict(data=2, fsdp=2, tensor=2)
RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(B, T, D)).astype(np.float32)
UNEMBED = RNG.normal(size=(D, V)).astype(np.float32)
TARGETS = RNG.integers(0, V, (B, T)).astype(np.int32)
WEIGHTS = RNG.normal(size=(B, T)).astype(np.float32)
MASK = RNG.random((B, T)) < 0.4
MASK[2] = False
ARGS = HIDDEN, UNEMBED, TARGETS, MASK


def rows_of(logits, targets):
    """Smoothed, so that it is a function of the whole row."""
    loss = losses.cross_entropy(logits, targets, label_smoothing=0.1, z_loss=1e-2)
    return loss, losses.entropy_from_logits(logits)


def everything(hidden, unembed, targets, mask, **layout):
    """A scalar of all that the recipes ask for, and what it is made of."""
    how = {"chunk_size": 64} | layout
    capped = {"temperature": 0.7, "softcap": 3.0, "return_entropy": True}
    scores = losses.token_logps(hidden, unembed, targets, mask=mask, **capped, **how)
    unmasked = losses.token_logps(hidden, unembed, targets, **how)
    total, entropy = sum_over_logits(rows_of, hidden, unembed, targets, mask, **how)
    parts = *scores, unmasked, entropy
    return total + sum(jnp.sum(WEIGHTS * x) for x in parts), parts


def gradients(**layout):
    function = functools.partial(everything, **layout)
    return jax.jit(jax.value_and_grad(function, (0, 1), has_aux=True))


@pytest.fixture(scope="module")
def alone():
    return gradients()(*ARGS)


def spread(sizes):
    """(the arguments on a mesh, their layout)."""
    mesh = sharding.make_mesh(**sizes)
    shapes = {"unembed": {"kernel": jax.ShapeDtypeStruct((D, V), np.float32)}}
    weights = sharding.param_shardings(mesh, shapes)["unembed"]["kernel"]
    rows = sharding.batch_sharding(mesh)
    layout = logits_groups(mesh, B, T, V)
    return jax.device_put(ARGS, (rows, weights, rows, rows)), layout


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_values_and_gradients_are_those_of_one_device(sizes, alone):
    args, layout = spread(sizes)
    compiled = gradients(layout=layout).lower(*args).compile()
    got = compiled(*args)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(alone), strict=True):
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        assert np.linalg.norm(one - other) < 1e-6 * np.linalg.norm(other)
    # The gradient lies as the parameter does, and nothing as large as it was made.
    assert got[1][1].sharding.is_equivalent_to(args[1].sharding, 2)
    share = V // layout.mesh.shape["members"] // layout.mesh.shape["tensor"]
    found = set(re.findall(rf"f32\[(?:\d,)*{D},(\d+)\]", compiled.as_text()))
    assert share < V and str(share) in found
    assert all(int(columns) <= share for columns in found)


def test_forward_mode_is_that_of_one_device():
    args, layout = spread(MESHES[0])

    def moved(args, **layout):
        def of(hidden, unembed):
            return everything(hidden, unembed, *args[2:], **layout)[0]

        return jax.jvp(of, args[:2], args[:2])

    got, want = jax.jit(functools.partial(moved, layout=layout))(args), moved(ARGS)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_chunks_without_a_counted_position_are_still_left_out():
    _, layout = spread(MESHES[0])
    # A condition that differs by group would compute both sides.
    assert " cond[" in str(jax.make_jaxpr(gradients(layout=layout))(*ARGS))


@pytest.mark.parametrize("length", [1, 8, 60, 1000])
def test_groups_are_the_smallest_that_send_no_more_hidden_states_than_weights(length):
    layout = logits_groups(sharding.make_mesh(fsdp=8), B, length, V)
    members, tokens = layout.mesh.shape["members"], B * length // 8

    def bytes_of(k):  # hidden states, and the unembedding
        return 8 * k * tokens * D, 8 * V * D / k

    assert np.greater_equal(*bytes_of(members)) or members == 8
    assert members == 1 or np.less(*bytes_of(members // 2))


def test_where_the_vocabulary_does_not_divide_the_groups_have_one_member():
    assert (
        logits_groups(sharding.make_mesh(fsdp=8), 8, 1, 63).mesh.shape["members"] == 1
    )


@pytest.mark.parametrize(
    ("features", "members"), [(16, 8), (256, 2), (512, 4), (4096, 8), (129, 1)]
)
def test_members_of_an_embedding_hold_128_features_where_there_are_so_many(
    features, members
):
    groups = embedding_groups(sharding.make_mesh(fsdp=8), features)
    assert groups.mesh.shape["members"] == members
    assert groups.mesh.shape["groups"] == 8 // members


def test_equal_layouts_are_one():
    one, other = (logits_groups(sharding.make_mesh(), B, T, V) for _ in range(2))
    assert one is other


def test_without_a_mesh_or_with_rows_that_do_not_divide_there_is_none():
    alone = sharding.make_mesh(devices=jax.devices()[:1])
    for mesh, rows in ((None, B), (alone, B), (sharding.make_mesh(), 9)):
        assert logits_groups(mesh, rows, T, V) is None
    assert embedding_groups(None, D) is None and embedding_groups(alone, D) is None

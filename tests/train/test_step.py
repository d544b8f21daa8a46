"""Micro-batches, mesh and filler rows change nothing; a bad step changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jalign import data, models, sharding, types
from jalign.losses.chunked import DEFAULT_CHUNK_SIZE
from jalign.models import lora
from jalign.train import objectives, optim, step
from tests.hlo import largest_buffer
from tests.train import tiny


@pytest.fixture(scope="module")
def params():
    return tiny.model().init(jax.random.key(0))


@pytest.fixture(scope="module")
def plain_step(params):
    """A step of tiny.token_batch on one device."""
    return take_step(params, tiny.token_batch())


def take_step(params, batch, *, microbatches=1, mesh=None, objective=None):
    model = tiny.model(mesh)
    # A large eps: else Adam's first step is the sign of rounding errors.
    settings = optim.OptimConfig(learning_rate=1e-3, eps=1e-2)
    tx, schedule = optim.make_optimizer(settings, 10)
    params = jax.tree.map(jnp.copy, params)
    state = step.init_state(params, tx, jax.random.key(1), mesh=mesh)
    pinned = None if mesh is None else sharding.state_shardings(mesh, state)
    fn = step.make_train_step(
        objective or objectives.make_sft_objective(model),
        tx,
        microbatches=microbatches,
        state_shardings=pinned,
        schedule=schedule,
    )
    return fn(state, sharding.put_batch(batch, mesh))


def assert_same_step(one, other, tolerance=1e-5):
    for name, value in one[1].items():
        np.testing.assert_allclose(value, other[1][name], rtol=tolerance, atol=1e-5)
    for a, b in zip(
        jax.tree.leaves(one[0].params), jax.tree.leaves(other[0].params), strict=True
    ):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5)


@pytest.mark.parametrize("count", [0.0, 1.0, 4.0])
def test_all_is_divided_by_its_count_once_and_by_1_where_nothing_counts(count):
    def objective(params, batch, key):
        metrics = {"third": (jnp.float32(2), jnp.float32(6))}
        metrics["one"] = (jnp.float32(5), jnp.float32(1))
        metrics["none"] = (jnp.float32(0), jnp.float32(0))
        metrics["draw"] = (jax.random.uniform(key), jnp.float32(1))
        return objectives.Loss((params * batch).sum(), jnp.float32(count), metrics)

    tx, key = optax.sgd(0.5), jax.random.key(5)
    given, batch = jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])
    state = step.init_state(jnp.copy(given), tx, key)._replace(step=jnp.int32(7))
    new, metrics = step.make_train_step(objective, tx)(state, batch)
    assert state.params.is_deleted()  # donated
    draw = jax.random.uniform(jax.random.fold_in(key, 7))
    by = max(count, 1)
    want = {"loss": 11 / by, "grad_norm": 5 / by, "num_tokens": 0, "skipped": 0}
    want |= {"third": 1 / 3, "one": 5, "none": 0, "draw": float(draw)}
    assert {k: float(x) for k, x in metrics.items()} == pytest.approx(want)
    assert int(new.step) == 8
    np.testing.assert_allclose(new.params, given - 0.5 * batch / by)


def test_parts_are_added_up_and_extremes_stay_extremes():
    """Six rows in three parts, of rows 0 and 3, 1 and 4, 2 and 5, each with its key."""
    rows, key, shapes = jnp.array([3.0, -1, 4, 1, -5, 9]), jax.random.key(3), set()

    def objective(params, rows, key):
        shapes.add(rows.shape)
        one = jnp.float32(1)
        metrics = {"mean_row": (rows.sum(), jnp.float32(rows.size))}
        metrics |= {"min_row": (rows.min(), one), "max_row": (rows.max(), one)}
        metrics["draw"] = (jax.random.uniform(key), one)
        return objectives.Loss(params * (rows**2).sum(), jnp.float32(4), metrics)

    for parts in (1, 3):
        shapes.clear()
        scale = jnp.bfloat16(2)
        loss, grad = step.accumulate(objective, scale, rows, key, parts)
        assert shapes == {(6 // parts,)}
        assert float(loss.sum) == 2 * 133 and float(loss.count) == 4 * parts
        assert float(grad) == 133 and grad.dtype == jnp.float32
        keys = [key] if parts == 1 else jax.random.split(key, parts)
        draws = sum(float(jax.random.uniform(one)) for one in keys)
        told = {name: tuple(map(float, x)) for name, x in loss.metrics.items()}
        assert told.pop("draw") == (pytest.approx(draws), parts)
        want = {"mean_row": (11, 6), "min_row": (-5, 1), "max_row": (9, 1)}
        assert told == want
    apart = step.split_microbatches(rows, 3)
    np.testing.assert_array_equal(apart, [[3, 1], [-1, -5], [4, 9]])


def test_dropout_is_put_into_the_whole_model_with_a_key_of_its_own():
    trained = {"m": {lora.A: jnp.ones((1, 2, 2))}}
    frozen = {"m": {"kernel": jnp.full((2, 2), 3.0)}}
    one, key = jnp.float32(1), jax.random.key(5)

    def told(params, key):
        leaves = jax.tree.leaves_with_path(params | {"key": jax.random.uniform(key)})
        sums = {str(path[-1].key): jnp.sum(x) for path, x in leaves}
        return {name: (x.astype(jnp.float32), one) for name, x in sums.items()}

    def objective(params, batch, key):
        return objectives.Loss(params["m"][lora.A].sum(), one, told(params, key))

    of_step = jax.random.fold_in(key, 0)
    want = lora.with_dropout(
        lora.join(frozen, trained), jax.random.fold_in(of_step, 1), 0.25
    )
    for dropout, whole in ((0.25, want), (0.0, lora.join(frozen, trained))):
        tx = optax.sgd(0.5)
        state = step.init_state(jax.tree.map(jnp.copy, trained), tx, key)
        fn = step.make_train_step(objective, tx, dropout=dropout)
        _, metrics = fn(state, jnp.ones((2, 3)), frozen)
        expected = {name: x for name, (x, _) in told(whole, of_step).items()}
        rest = {"loss", "grad_norm", "num_tokens", "skipped"}
        assert metrics.keys() == expected.keys() | rest
        assert ("lora_rate" in expected) == bool(dropout)
        for name, x in expected.items():
            np.testing.assert_allclose(metrics[name], x, rtol=1e-6)


def test_a_step_that_is_not_finite_changes_nothing():
    def objective(params, batch, key):
        del key
        total = jnp.sum(params["layers"]["kernel"] * batch)
        return objectives.Loss(total, jnp.float32(1), {})

    tx, schedule = optim.make_optimizer(optim.OptimConfig(optimizer="adamw"), 5)
    params = {"layers": {"kernel": jnp.ones(4)}}
    state = step.init_state(params, tx, jax.random.key(0))
    fn = step.make_train_step(objective, tx, schedule=schedule)
    state, metrics = fn(state, jnp.ones(4))
    before = jax.tree.map(np.array, (state.params, state.opt_state))
    rate = float(metrics["learning_rate"])
    for bad in (jnp.nan, jnp.inf):
        state, metrics = fn(state, jnp.full(4, bad))
        assert float(metrics["skipped"]) == 1
        assert tiny.same(before, (state.params, state.opt_state))
    assert int(state.step) == 3
    # The schedule has moved by the one good step only.
    assert float(metrics["learning_rate"]) == pytest.approx(rate * 4 / 5)
    state, metrics = fn(state, jnp.ones(4))
    assert float(metrics["skipped"]) == 0 and not tiny.same(before[0], state.params)


def test_new_parameters_that_are_not_finite_are_not_taken():
    def objective(params, batch, key):
        del key
        return objectives.Loss(jnp.sum(params["kernel"] * batch), jnp.float32(1), {})

    for rate in (float("inf"), 1e30):
        tx, _ = optim.make_optimizer(optim.OptimConfig(learning_rate=rate), 5)
        state = step.init_state({"kernel": jnp.ones(4)}, tx, jax.random.key(0))
        state, metrics = step.make_train_step(objective, tx)(state, jnp.ones(4))
        assert float(metrics["skipped"]) == 1 and np.isfinite(metrics["loss"])
        assert tiny.same(state.params, {"kernel": jnp.ones(4)})
        moments = jax.tree.leaves(state.opt_state)
        assert all(np.isfinite(x).all() for x in moments)


def test_the_new_state_lies_where_it_is_wanted():
    def objective(params, batch, key):
        total = jnp.sum(params["embed"]["embedding"] * batch)
        return objectives.Loss(total, jnp.float32(1), {})

    tx, batch = optax.sgd(0.5), jnp.ones((16, 8))
    params = {"embed": {"embedding": jnp.ones((16, 8))}}
    state = step.init_state(params, tx, jax.random.key(0))
    wanted = sharding.state_shardings(sharding.make_mesh(fsdp=8), state)
    fn = step.make_train_step(objective, tx, state_shardings=wanted)
    kernel = fn(state, batch)[0].params["embed"]["embedding"]
    place = wanted.params["embed"]["embedding"]
    assert kernel.sharding.is_equivalent_to(place, 2)
    assert not kernel.sharding.is_fully_replicated


def test_init_inside_the_jit_is_sharded(params):
    mesh = sharding.make_mesh(fsdp=8)
    tx = optax.adam(1e-3)
    model = tiny.model(mesh)
    state = step.init_state(model.init, tx, jax.random.key(0), mesh=mesh)
    moments = state.opt_state[0].mu["embed"]["embedding"]
    assert not moments.sharding.is_fully_replicated
    wanted = step.abstract_state(model.param_shapes(), tx, mesh=mesh)
    for leaf, target in zip(
        jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(target.sharding, leaf.ndim)
        assert (leaf.shape, leaf.dtype) == (target.shape, target.dtype)


def test_parameters_that_lie_as_the_mesh_wants_them_are_taken_over(params):
    mesh, tx, key = sharding.make_mesh(fsdp=8), optax.adam(1e-3), jax.random.key(0)
    wanted = sharding.param_shardings(mesh, params)
    laid_out = jax.device_put(jax.tree.map(np.asarray, params), wanted)
    state = step.init_state(laid_out, tx, key, mesh=mesh)
    for new, old in zip(*map(jax.tree.leaves, (state.params, laid_out)), strict=True):
        assert [x.data.unsafe_buffer_pointer() for x in new.addressable_shards] == [
            x.data.unsafe_buffer_pointer() for x in old.addressable_shards
        ]
    # Others are laid out first, if it be one of them, and stay the caller's.
    mixed = laid_out | {"embed": params["embed"]}
    for given in (params, jax.tree.map(np.asarray, params), mixed):
        state = step.init_state(given, tx, key, mesh=mesh)
        for new, place in zip(
            *map(jax.tree.leaves, (state.params, wanted)), strict=True
        ):
            assert new.sharding.is_equivalent_to(place, new.ndim)
        assert tiny.same(state.params, params)


def test_microbatches_change_nothing(params, plain_step):
    assert_same_step(plain_step, take_step(params, tiny.token_batch(), microbatches=4))


def test_tokens_are_counted_without_padding(plain_step):
    count = np.sum(tiny.token_batch().segment_ids > 0)
    assert float(plain_step[1]["num_tokens"]) == count


def test_mesh_changes_nothing(params, plain_step):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    assert_same_step(plain_step, take_step(params, tiny.token_batch(), mesh=mesh))


def test_filler_rows_change_nothing():
    model = tiny.model(num_labels=1)
    params = model.init(jax.random.key(0))
    objective = objectives.make_reward_objective(model)
    pairs = tiny.pairs(4)
    more = [*pairs, *[data.filler(pairs[0])] * 4]
    short, long = (data.collate_preferences(p, 16) for p in (pairs, more))
    a = take_step(params, short, objective=objective)
    b = take_step(params, long, objective=objective, microbatches=2)
    assert float(a[1].pop("num_tokens")) == float(b[1]["num_tokens"])
    assert_same_step(a, b)
    assert float(b[1]["min_reward"]) <= float(b[1]["mean_reward"])


@pytest.mark.parametrize("recipe", ["sft", "reward", "dpo"])
def test_packing_changes_nothing(recipe):
    model = tiny.model(num_labels=int(recipe == "reward"))
    params = model.init(jax.random.key(0))
    make = getattr(objectives, f"make_{recipe}_objective")
    if recipe == "sft":
        items, collate = tiny.examples(8), data.collate_tokens
        rows = [items[:3], items[3:5], items[5:], []]
    else:
        items, collate = tiny.pairs(8), data.collate_preferences
        others = [*items[5:], data.filler(items[0]), data.filler(items[0])]
        rows = [
            data.PackedPairs(items[:5], [[9, 2, 4], [0, 1, 3], [8, 5], [6, 7]]),
            data.PackedPairs(others, [[0, 5], [1, 2, 3], [4], []]),
        ]
    one, whole, in_parts = (
        take_step(params, batch, objective=make(model), microbatches=parts)
        for batch, parts in (
            (collate(items, 16), 1),
            (collate(rows, 40), 1),
            (collate(rows, 40), 2),
        )
    )
    assert_same_step(one, whole)
    assert_same_step(one, in_parts)


def test_rows_that_do_not_divide_raise(params):
    with pytest.raises(ValueError, match="microbatches 3 does not divide"):
        take_step(params, tiny.token_batch(), microbatches=3)


def test_a_long_row_makes_no_array_of_all_scores_or_all_logits():
    length, vocab = 4096, 4096

    def largest(attention):
        config = tiny.config(vocab_size=vocab, num_layers=1)
        model = models.Model(config, attention=attention)
        tx, _ = optim.make_optimizer(optim.OptimConfig(), 10)
        state = step.abstract_state(model.param_shapes(), tx)
        ids, mask = (jax.ShapeDtypeStruct((1, length), t) for t in (jnp.int32, bool))
        fn = step.make_train_step(objectives.make_sft_objective(model), tx)
        compiled = fn.lower(state, types.TokenBatch(ids, mask, ids, ids)).compile()
        return largest_buffer(compiled.as_text())

    assert largest("auto") <= DEFAULT_CHUNK_SIZE * vocab
    assert largest("plain") >= length * length  # so the measure would have seen it

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import generate, losses, sharding
from tests.generate.doubles import HistoryModel, UniformModel

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [2, 2]]
N = 8


@pytest.fixture
def model():
    return HistoryModel()


@pytest.fixture
def params(model, key):
    return model.init(key)


def sample(model, params, prompts=PROMPTS, seed=1, **how):
    how = dict(key=jax.random.key(seed), max_new_tokens=N) | how
    return generate.to_host(generate.generate(model, params, prompts, **how))


def rollout_without_cache(model, params, prompt, steps):
    """Greedy, running the whole row through the model for every token."""
    row = jnp.zeros((1, 16), jnp.int32).at[0, : len(prompt)].set(jnp.array(prompt))
    for at in range(len(prompt), len(prompt) + steps):
        hidden, _ = model.apply(params, row)  # what stands behind has no influence
        row = row.at[0, at].set(jnp.argmax(hidden[0, at - 1] @ model.unembed(params)))
    return row[0, len(prompt) : len(prompt) + steps].tolist()


def teacher_forced(model, params, prompt, tokens, temperature):
    row = jnp.array([[*prompt, *tokens]])
    hidden, _ = model.apply(params, row)
    unembed = model.unembed(params)
    logps = losses.token_logps(
        hidden[:, :-1], unembed, row[:, 1:], temperature=temperature
    )
    return logps[0, len(prompt) - 1 :]


def assert_same(a, b):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.mask, b.mask)
    np.testing.assert_allclose(a.logps, b.logps, atol=1e-5)


def test_greedy_equals_the_rollout_without_a_cache(model, params):
    completion = sample(model, params, temperature=0)
    for prompt, tokens in zip(PROMPTS, completion.tokens, strict=True):
        assert tokens.tolist() == rollout_without_cache(model, params, prompt, N)
    assert completion.tokens.dtype == np.int32
    assert completion.logps.dtype == np.float32
    assert completion.mask.dtype == bool and completion.mask.all()


@pytest.mark.parametrize(
    "how",
    [
        dict(temperature=0),
        dict(temperature=1.0),
        dict(temperature=0.6),
        dict(temperature=1.3, top_k=3, top_p=0.8),
    ],
)
def test_logps_are_what_the_trainer_computes(how, model, params):
    completion = sample(model, params, **how)
    temperature = how["temperature"] or 1.0
    for row, prompt in enumerate(PROMPTS):
        expected = teacher_forced(
            model, params, prompt, completion.tokens[row], temperature
        )
        np.testing.assert_allclose(completion.logps[row], expected, atol=1e-4)


def test_padding_and_batch_composition_change_nothing(model, params):
    together = sample(model, params)
    keys = [jax.random.fold_in(jax.random.key(1), row) for row in range(4)]
    for row, prompt in enumerate(PROMPTS):
        alone = sample(model, params, [prompt], key=keys[row][None])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        np.testing.assert_allclose(alone.logps[0], together.logps[row], atol=1e-5)
    # A long neighbour moves the batch to another bucket.
    longer = sample(model, params, [*PROMPTS, [3] * 20])
    np.testing.assert_array_equal(longer.tokens[:4], together.tokens)


def test_rows_of_one_prompt_differ_and_the_key_decides(model, params):
    how = dict(prompts=[[1, 2]] * 4, temperature=3.0)
    same = sample(model, params, **how)
    assert len({tuple(row) for row in same.tokens.tolist()}) == 4
    assert_same(same, sample(model, params, **how))
    other = sample(model, params, seed=2, **how)
    assert not np.array_equal(same.tokens, other.tokens)


def test_stop_tokens_end_a_row_and_stay_in_it(model, params):
    free = sample(model, params)
    stops = [int(free.tokens[0, 2]), int(free.tokens[2, 4])]
    stopped = sample(model, params, stop_tokens=stops)
    for row in range(4):
        tokens = free.tokens[row].tolist()
        hits = [i for i, token in enumerate(tokens) if token in stops]
        length = hits[0] + 1 if hits else N
        assert stopped.mask[row].tolist() == [i < length for i in range(N)]
        assert stopped.tokens[row, :length].tolist() == tokens[:length]
        assert not stopped.tokens[row, length:].any()
        assert not stopped.logps[row, length:].any()
    assert not stopped.mask[0, 3:].any()
    lists = generate.completion_lists(stopped)
    assert [len(row) for row in lists] == stopped.mask.sum(1).tolist()
    assert lists[0][-1] in stops


def test_decoding_ends_when_all_rows_are_done(params):
    calls = []

    class Counting(HistoryModel):
        def apply(self, params, tokens, **how):
            jax.debug.callback(lambda: calls.append(tokens.shape[1]))
            return super().apply(params, tokens, **how)

    every = range(HistoryModel().vocab_size)
    completion = sample(Counting(), params, stop_tokens=list(every))
    jax.effects_barrier()
    assert calls == [16] and completion.mask.sum() == len(PROMPTS)


def test_no_pass_through_the_model_is_wasted(params):
    calls = []

    class Counting(HistoryModel):
        def apply(self, params, tokens, **how):
            jax.debug.callback(lambda: calls.append(tokens.shape[1]))
            return super().apply(params, tokens, **how)

    sample(Counting(max_position=65), params)
    jax.effects_barrier()
    assert calls == [16] + [1] * (N - 1)


def test_uniform_logits_give_uniform_tokens(params):
    completion = sample(UniformModel(), params, [[1]] * 200)
    np.testing.assert_allclose(completion.logps, -np.log(11), atol=1e-6)
    share = (
        np.bincount(completion.tokens.ravel(), minlength=11) / completion.tokens.size
    )
    np.testing.assert_allclose(share, 1 / 11, atol=0.03)


def test_only_shapes_and_kinds_of_sampling_compile(model, params, caplog):
    caplog.set_level(logging.INFO, "jalign")
    new = HistoryModel(max_position=63)  # nothing else has compiled for this one
    for how in (
        dict(temperature=0.7),
        dict(temperature=1.1, seed=5),
        dict(prompts=[[3], [4, 5], [6], [1] * 9]),
        dict(top_k=3),
        dict(top_p=0.5, top_k=2),
    ):
        sample(new, params, **how)
    compiled = [r for r in caplog.records if "compiling" in r.message]
    assert len(compiled) == 2  # plain and filtered


def test_padding_to_more_and_longer_prompts_changes_nothing(model, params, caplog):
    plain = sample(model, params, group_size=2, stop_tokens=[7])
    caplog.set_level(logging.INFO, "jalign")
    new = HistoryModel(max_position=62)
    for prompts in (PROMPTS, PROMPTS[:2]):
        how = dict(group_size=2, stop_tokens=[7], pad_to=(5, 20))
        padded = sample(new, params, prompts, **how)
        rows = 2 * len(prompts)
        assert len(padded.tokens) == rows
        assert_same(padded, type(plain)(*(x[:rows] for x in plain)))
    assert sum("compiling" in r.message for r in caplog.records) == 1


@pytest.mark.parametrize("mesh", [dict(), dict(data=2, fsdp=2, tensor=2)])
@pytest.mark.parametrize("rows", [8, 3])
def test_a_mesh_changes_nothing(mesh, rows, model, params):
    prompts = [[i % 11, 3, 5][: 1 + i % 3] for i in range(rows)]
    plain = sample(model, params, prompts, top_k=5)
    on_mesh = HistoryModel(mesh=sharding.make_mesh(**mesh))
    assert_same(plain, sample(on_mesh, params, prompts, top_k=5))


def test_rows_stay_sharded(params):
    model = HistoryModel(mesh=sharding.make_mesh())
    completion = generate.generate(
        model, params, [[1]] * 8, key=jax.random.key(0), max_new_tokens=2
    )
    for x in completion:
        assert x.sharding.is_equivalent_to(sharding.batch_sharding(model.mesh), 2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error_naming_the_row(value, model, params):
    broken = params | {"embed": params["embed"].at[8].set(value)}
    with pytest.raises(FloatingPointError, match=r"row\(s\) 2 of 4"):
        sample(model, broken, stop_tokens=[8])


def test_bad_arguments_are_refused(model, params):
    with pytest.raises(ValueError, match="top_p"):
        sample(model, params, top_p=0)
    with pytest.raises(ValueError, match="stop_tokens: token 99"):
        sample(model, params, stop_tokens=[99])
    with pytest.raises(ValueError, match="context is 64"):
        sample(model, params, max_new_tokens=64)


FIVE = [*PROMPTS, [3]]


def test_the_batch_size_changes_nothing(key):
    model = HistoryModel()
    params = model.init(key)
    how = dict(key=jax.random.key(3), max_new_tokens=6, stop_tokens=[7])
    whole = generate.completion_lists(generate.generate(model, params, FIVE, **how))
    for size in (1, 2, 5, 64):
        lists = generate.generate_lists(model, params, FIVE, batch_size=size, **how)
        assert lists == whole
    with pytest.raises(ValueError, match="batch_size"):
        generate.generate_lists(model, params, FIVE, batch_size=0, **how)
    with pytest.raises(ValueError, match="no prompts"):
        generate.generate_lists(model, params, [], **how)


class WordTokenizer:
    """Like SentencePiece: a space between words, none before the first."""

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return " ".join(f"w{i}" for i in ids if i)


def test_continuation_keeps_the_space_at_the_border():
    assert generate.continuation(WordTokenizer(), [1, 2], [3, 0]) == " w3"
    assert generate.continuation(WordTokenizer(), [0], [3]) == "w3"

import jax
import numpy as np
import pytest

from jalign import generate, sharding
from jalign.generate import inputs, sampling
from tests.generate.doubles import HistoryModel


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(temperature=-1.0), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(top_k=-1), "top_k"),
        (dict(top_p=0.0), "top_p"),
        (dict(top_p=1.5), "top_p"),
    ],
)
def test_settings_out_of_range_are_named(change, word):
    good = dict(max_new_tokens=1, temperature=1.0, top_k=0, top_p=1.0)
    inputs.check_settings(**good)
    with pytest.raises(ValueError, match=word):
        inputs.check_settings(**(good | change))


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([], "no prompts"),
        ([[1], []], "prompt 1 has no tokens"),
        ([[1], [2, 11]], "prompt 1: token 11"),
        ([[-1]], "prompt 0: token -1"),
        ([[1], [1] * 61], "prompt 1 of 61 tokens and max_new_tokens=4 make 65"),
    ],
)
def test_bad_prompts_are_named(prompts, message):
    with pytest.raises(ValueError, match=message):
        inputs.check_prompts(prompts, HistoryModel().config, 4)


def test_buckets_are_few_and_at_most_half_too_long():
    buckets = sorted({inputs.bucket_length(n) for n in range(1, 1001)})
    expected = [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert buckets == expected
    assert all(inputs.bucket_length(n) >= n for n in range(1, 1001))


def test_prompts_stand_left_and_filler_rows_hold_one_token():
    tokens, lengths = inputs.pad_prompts([[5, 6], np.array([7])], 4)
    assert tokens.shape == (4, 16) and tokens.dtype == lengths.dtype == np.int32
    assert tokens[0, :3].tolist() == [5, 6, 0] and tokens[1, :2].tolist() == [7, 0]
    assert lengths.tolist() == [2, 1, 1, 1] and not tokens[2:].any()


def test_rows_are_padded_to_the_devices_they_are_cut_over():
    assert sharding.batch_parts(None) == 1
    assert sharding.batch_parts(sharding.make_mesh()) == 8
    mesh = sharding.make_mesh(data=2, fsdp=1, tensor=4)
    assert sharding.batch_parts(mesh) == 2
    completion = generate.generate(
        HistoryModel(mesh=mesh),
        HistoryModel().init(jax.random.key(0)),
        [[1]] * 5,
        key=jax.random.key(1),
        max_new_tokens=2,
    )
    assert completion.tokens.shape == (5, 2)


def test_row_keys_fold_the_index_or_are_taken_as_given(key):
    folded = sampling.row_keys(key, 3, 4)
    assert folded.shape[0] == 4
    expected = jax.random.key_data(jax.random.fold_in(key, 2))
    np.testing.assert_array_equal(folded[2], expected)
    given = jax.random.split(key, 3)
    same = sampling.row_keys(given, 3, 3)
    np.testing.assert_array_equal(same, jax.random.key_data(given))
    with pytest.raises(ValueError, match="one key or 4"):
        sampling.row_keys(given, 4, 4)
    with pytest.raises(ValueError, match="typed PRNG key"):
        sampling.row_keys(jax.random.PRNGKey(0), 2, 2)


def test_place_cuts_rows_over_the_mesh():
    mesh = sharding.make_mesh()
    x = np.arange(16).reshape(8, 2)
    placed = inputs.place((x,), mesh)[0]
    np.testing.assert_array_equal(placed, x)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(1, 2)}
    assert inputs.place(x, None) is x

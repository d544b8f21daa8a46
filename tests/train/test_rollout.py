"""Tests for jalign/train/rollout.py."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jalign.train.online_config import PPOOptions, ScoreOptions
from jalign.train.ppo import estimate_advantages, make_rollout, rollout_metrics
from jalign.train.rollout import (
    GOLD,
    RolloutFunctions,
    Scored,
    ended,
    evaluate_prompts,
    join,
    reference_kl,
    sample_and_score,
    shape_scores,
)
from jalign.types import Completion, TokenBatch
from tests.train.ppo_world import make_prompts

MASK = np.array([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]], bool)
OPTIONS = dict(kl_coef=0.1, gamma=0.9, gae_lambda=0.8)


class WordTokenizer:
    """A word is its id."""

    def decode(self, ids, **how):
        return " ".join(map(str, ids))


def completion(rows, width):
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width))
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, 1
    return Completion(tokens, np.zeros(mask.shape, np.float32), mask.astype(bool))


def random_case(seed=0):
    rng = np.random.default_rng(seed)
    logps, ref, values = rng.normal(size=(3, *MASK.shape)).astype(np.float32)
    return np.float32([1.5, -0.5]), logps, ref, values


def oracle(scores, logps, ref, values, mask, *, kl_coef, gamma, gae_lambda):
    """Float64, row by row: the score on the last token, GAE backwards."""
    advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
    for b in range(len(mask)):
        places = np.flatnonzero(mask[b])
        following, next_value = 0.0, 0.0
        for t in places[::-1]:
            reward = -kl_coef * (float(logps[b, t]) - float(ref[b, t]))
            reward += float(scores[b]) if t == places[-1] else 0.0
            delta = reward + gamma * next_value - float(values[b, t])
            following = delta + gamma * gae_lambda * following
            next_value = float(values[b, t])
            advantages[b, t], returns[b, t] = following, following + next_value
    return advantages, returns


def test_join_places_completions_behind_prompts_of_any_length():
    batch = join([[5, 6], [7]], completion([[8, 0, 2], [9]], 3), 6)
    np.testing.assert_array_equal(batch.tokens, [[5, 6, 8, 0, 2, 0], [7, 9, *[0] * 4]])
    # The generated 0 counts, although it equals the padding.
    np.testing.assert_array_equal(
        batch.completion_mask, [[0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        batch.segment_ids, [[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        batch.positions, [[0, 1, 2, 3, 4, 0], [0, 1, 0, 0, 0, 0]]
    )
    assert batch.tokens.dtype == batch.positions.dtype == np.int32


def test_ended_looks_at_generated_tokens_only():
    done = completion([[8, 2], [8, 9], [2]], 2)
    np.testing.assert_array_equal(ended(done, [2]), [True, False, True])
    # Padding holds 0: a stop token 0 ends the row that generated it, and no other.
    np.testing.assert_array_equal(ended(done, [0]), [False] * 3)


def test_scores_are_clipped_first_and_penalized_then():
    rewards, stopped = np.float32([5, -5, 0.5]), np.array([True, False, False])
    options = ScoreOptions(reward_clip=2.0, missing_eos_penalty=1.0)
    np.testing.assert_array_equal(
        shape_scores(rewards, stopped, options), [2.0, -3.0, -0.5]
    )
    np.testing.assert_array_equal(
        shape_scores(rewards, stopped, ScoreOptions()), rewards
    )


def test_advantages_and_returns_match_the_closed_form():
    case = random_case()
    got = estimate_advantages(*case, MASK, **OPTIONS, whiten_advantages=False)
    for mine, theirs in zip(got, oracle(*case, MASK, **OPTIONS), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_whitened_advantages_leave_returns_alone_and_padding_at_zero():
    case = random_case()
    expected, returns = oracle(*case, MASK, **OPTIONS)
    kept = expected[MASK]
    white, got = estimate_advantages(*case, MASK, **OPTIONS)
    np.testing.assert_allclose(
        np.asarray(white)[MASK], (kept - kept.mean()) / kept.std(ddof=1), atol=1e-5
    )
    assert not np.asarray(white)[~MASK].any()
    np.testing.assert_allclose(got, returns, atol=1e-5)


def test_whitened_rewards_keep_their_mean():
    case = random_case()
    values = np.zeros_like(case[3])
    plain = dict(kl_coef=0.1, gamma=0.0, gae_lambda=0.0, whiten_advantages=False)
    token_rewards, _ = estimate_advantages(*case[:3], values, MASK, **plain)
    white, _ = estimate_advantages(
        *case[:3], values, MASK, **plain, whiten_rewards=True
    )
    raw, scaled = np.asarray(token_rewards)[MASK], np.asarray(white)[MASK]
    np.testing.assert_allclose(
        scaled, (raw - raw.mean()) / raw.std(ddof=1) + raw.mean(), atol=1e-5
    )


@pytest.mark.parametrize("seed", [1, 2])
def test_padding_contents_and_length_change_nothing(seed):
    scores, *arrays = random_case(seed)
    expected = estimate_advantages(scores, *arrays, MASK, **OPTIONS)
    dirty = [np.where(MASK, x, np.float32(np.nan)) for x in arrays]
    wide = [np.pad(x, ((0, 0), (0, 3)), constant_values=7) for x in dirty]
    mask = np.pad(MASK, ((0, 0), (0, 3)))
    for got, want in zip(
        estimate_advantages(scores, *wide, mask, **OPTIONS), expected, strict=True
    ):
        np.testing.assert_allclose(got[:, :6], want, rtol=1e-6, atol=1e-6)
        assert not np.asarray(got[:, 6:]).any()


def scored_case():
    scores, logps, ref, _ = random_case()
    logps, ref = np.where(MASK, logps, 0), np.where(MASK, ref, 0)
    ints = MASK.astype(np.int32)
    return Scored(
        TokenBatch(ints, MASK, ints, ints),
        logps,
        np.where(MASK, logps - np.float32(0.25), 7),
        ref,
        scores,
        np.array([True, False]),
        ["x", "y"],
    )


def test_metrics_are_per_completion():
    scored = scored_case()
    scores = np.float32([1.0, 2.0])
    row = rollout_metrics(scored, scores, 0.5, PPOOptions())
    kl = (scored.logps - scored.ref_logps).sum(1).mean()
    assert row["objective/kl"] == pytest.approx(kl, rel=1e-5)
    assert row["objective/entropy"] == pytest.approx(-scored.logps.sum(1).mean())
    assert row["objective/non_score_reward"] == pytest.approx(-0.5 * kl, rel=1e-5)
    assert row["objective/rlhf_reward"] == pytest.approx(1.5 - 0.5 * kl, rel=1e-5)
    assert row["objective/scores"] == 1.5 and row["reward"] == 0.5
    assert row["val/num_eos_tokens"] == 1 and row["completions/clipped_ratio"] == 0.5
    assert row["completions/mean_length"] == 2.5
    gap = row["sampling/sampling_logp_difference/max"]
    assert gap == pytest.approx(0.25)  # not the 7 outside the mask


def test_without_the_policys_pass_the_kl_is_of_the_samplers_numbers():
    scored = scored_case()
    np.testing.assert_allclose(
        reference_kl(scored), (scored.logps - scored.ref_logps).sum(1), rtol=1e-5
    )
    # The sampler says 0.25 nats less of each token, and something else outside.
    less = reference_kl(scored) - 0.25 * MASK.sum(1)
    np.testing.assert_allclose(
        reference_kl(scored._replace(logps=None)), less, rtol=1e-5, atol=1e-6
    )


def test_make_rollout_carries_what_the_objectives_read():
    scored = scored_case()
    values = np.where(MASK, random_case()[3], 0)
    options = PPOOptions(gamma=0.9, gae_lambda=0.8)
    scored = scored._replace(values=values)
    rollout = make_rollout(scored, scored.rewards, 0.1, options)
    assert rollout.old_logps is scored.logps and rollout.values is values
    *arrays, sampler_logps, routing = rollout
    assert sampler_logps is None  # PPO compares them in rollout_metrics
    assert routing is None
    assert {x.shape for x in arrays} == {MASK.shape}
    assert all(isinstance(x, np.ndarray) for x in arrays)


def test_sample_and_score_hands_on_texts_rows_and_the_samplers_logps(key):
    prompts, seen = make_prompts(3), {}
    made = completion([[4, 5], [6], [7, 2]], 2)
    # What the sampler leaves behind a completion must not be carried along.
    made = made._replace(logps=np.where(made.mask, np.float32(-1.0), np.float32(9)))

    def reward(*args):
        seen["reward"] = args
        return np.arange(3, dtype=np.float32)

    def score(params, batch, with_logps):
        assert params == {"policy": "params"} and with_logps
        logps = np.where(batch.completion_mask, np.float32(-1.5), np.float32(0))
        zeros = np.zeros(batch.tokens.shape, np.float32)
        return {"policy": (logps, 2 * logps, None), "reference": zeros}

    functions = RolloutFunctions(
        sample=lambda params, prompts, key: made,
        score=score,
        reward=reward,
        tokenizer=WordTokenizer(),
        stop_tokens=(2,),
        row_lengths=(16,),
    )
    scored = sample_and_score(functions, {"policy": "params"}, prompts, key)
    texts, rows = [p.text for p in prompts], [p.row for p in prompts]
    # The stop token is no part of the text.
    assert seen["reward"] == (texts, [" 4 5", " 6", " 7"], rows)
    mask = scored.batch.completion_mask
    np.testing.assert_array_equal(scored.sampler_logps, np.where(mask, -1.0, 0.0))
    np.testing.assert_array_equal(scored.logps, np.where(mask, -1.5, 0.0))
    np.testing.assert_array_equal(scored.values, np.where(mask, -3.0, 0.0))
    assert scored.sampler_logps.dtype == np.float32
    np.testing.assert_array_equal(scored.stopped, [False, False, True])
    assert scored.batch.tokens.shape == (3, 16)


def test_the_completions_of_a_prompt_lie_behind_each_other(key):
    """Two rewards, two prompts, two completions each: names, weights and order."""
    prompts, seen = make_prompts(2), {}
    made = completion([[4], [5], [6], [7]], 1)

    def reward(texts_in, texts, rows):
        seen["reward"] = texts_in, texts, rows
        return np.float32([[1, 10], [2, 20], [3, 30], [4, 40]])

    functions = RolloutFunctions(
        sample=lambda params, prompts, key: made,
        score=lambda params, batch, with_logps: {},
        reward=reward,
        tokenizer=WordTokenizer(),
        stop_tokens=(2,),
        row_lengths=(16,),
        reward_weights={"a": 1.0, "b": -0.5},
        group_size=2,
    )
    scored = sample_and_score(functions, {"policy": "params"}, prompts, key)
    texts_in, texts, rows = seen["reward"]
    assert texts_in == [prompts[0].text] * 2 + [prompts[1].text] * 2
    assert texts == [" 4", " 5", " 6", " 7"] and rows[2] is prompts[1].row
    first = len(prompts[1].tokens)
    np.testing.assert_array_equal(scored.batch.tokens[2:, first], [6, 7])
    np.testing.assert_array_equal(scored.rewards, [-4, -8, -12, -16])
    np.testing.assert_array_equal(scored.reward_parts["b"], [10, 20, 30, 40])
    assert scored.ref_logps is None


def test_the_figures_of_held_out_prompts_are_means_over_all_of_them():
    """Three prompts in rollouts of two: every figure by hand."""
    prompts, seen = make_prompts(3), []
    made = [completion([[4, 5], [6, 2]], 2), completion([[7]], 2)]
    # Of the completions of the first, second and third prompt.
    judged = np.float32([[1, 10, 5], [2, np.nan, 6], [4, 40, 9]])

    def sample(params, prompts, key):
        assert params == "params"
        seen.append((len(prompts), key))
        return made[len(seen) - 1]

    def reward(texts_in, texts, rows):
        return judged[:2] if len(texts) == 2 else judged[2:]

    def score(params, batch, with_logps):
        assert with_logps
        logps = np.full(batch.tokens.shape, -1.0, np.float32)
        return {"policy": (logps, None, None), "reference": 1.25 * logps}

    functions = RolloutFunctions(
        sample=sample,
        score=score,
        reward=reward,
        tokenizer=WordTokenizer(),
        stop_tokens=(2,),
        row_lengths=(8, 16),
        reward_weights={"a": 1.0, "b": 0.1, GOLD: 0.0},
    )
    config = SimpleNamespace(seed=4, completions=2, has_reference=True)
    figures, texts = evaluate_prompts(functions, "params", prompts, config)
    assert [n for n, _ in seen] == [2, 1] and seen[0][1] != seen[1][1]
    key = jax.random.fold_in(jax.random.key(4), 2**31 - 1)
    assert [k for _, k in seen] == [jax.random.fold_in(key, i) for i in range(2)]
    assert texts == [" 4 5", " 6"]
    want = {
        "reward": (2 + 2 + 8) / 3,
        "gold_reward": 20 / 3,
        "rewards/a": 7 / 3,
        "rewards/b": 25,
        "kl": 0.25 * 5 / 3,
        "completion_length": 5 / 3,
        "stopped": 1 / 3,
    }
    assert figures == pytest.approx(want)
    alone = functions._replace(reward_weights={"a": 1.0, GOLD: 0.0})
    seen.clear()
    judged = judged[:, ::2]
    few, _ = evaluate_prompts(alone, "params", prompts, config)
    assert few.keys() == want.keys() - {"rewards/a", "rewards/b"}
    assert few["gold_reward"] == pytest.approx(20 / 3)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import data, evaluate, generate, rewards, sharding
from tests.generate.doubles import HistoryModel, UniformModel

MODEL = HistoryModel()


@pytest.fixture
def params(key):
    return MODEL.init(key)


def example(tokens, start):
    tokens = np.asarray(tokens, np.int32)
    return data.Example(tokens, np.arange(len(tokens)) >= start)


EMPTY = data.Example(np.zeros(0, np.int32), np.zeros(0, bool))
EXAMPLES = [
    example([1, 2, 3, 4], 2),
    example([5, 6], 1),
    example([7, 8, 9, 1, 2, 3], 3),
    EMPTY,
]


def logps_of(params, tokens):
    """log p of tokens 1.. given those before, by hand in float64."""
    embed, table = (np.asarray(params[k], np.float64) for k in ("embed", "table"))
    state, logps = 0.0, []
    for now, after in zip(tokens[:-1], tokens[1:], strict=True):
        state = 0.7 * state + embed[now]
        logits = state @ table
        logps.append(logits[after] - np.log(np.exp(logits).sum()))
    return np.array(logps)


def summed(params, item):
    if not len(item.tokens):
        return 0.0
    return logps_of(params, item.tokens)[item.completion_mask[1:]].sum()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("mesh", [None, dict(data=2, fsdp=1, tensor=4)])
def test_eval_loss_is_per_token_over_all_batches(parts, mesh, params):
    mesh = sharding.make_mesh(**mesh) if mesh else None
    size = len(EXAMPLES) // parts
    batches = [
        data.collate_tokens(EXAMPLES[i : i + size], 8)
        for i in range(0, len(EXAMPLES), size)
    ]
    result = evaluate.eval_loss(HistoryModel(mesh=mesh), params, batches)
    expected = -sum(summed(params, item) for item in EXAMPLES) / 6
    assert result["num_tokens"] == 6
    np.testing.assert_allclose(result["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(result["perplexity"], np.exp(expected), rtol=1e-4)


def test_eval_loss_of_the_uniform_model_is_log_v(params):
    batches = [data.collate_tokens(EXAMPLES, 8)]
    result = evaluate.eval_loss(UniformModel(), params, batches)
    np.testing.assert_allclose(result["perplexity"], 11, rtol=1e-5)
    with pytest.raises(ValueError, match="no trained token"):
        evaluate.eval_loss(MODEL, params, [data.collate_tokens([EMPTY], 8)])


PAIRS = [
    data.PreferenceExample(example([1, 2, 3], 1), example([1, 4], 1), 0.0, -3.0, -9.0),
    data.PreferenceExample(example([5, 6], 1), example([5, 7, 8], 1), 0.0, -4.0, -2.0),
    data.PreferenceExample(example([9, 1, 1], 1), example([9, 2], 1)),
    data.PreferenceExample(EMPTY, EMPTY),
]


def test_preference_accuracy_by_the_implicit_reward(params):
    batches = [data.collate_preferences(PAIRS, 8)]
    result = evaluate.preference_accuracy(MODEL, params, batches, beta=0.5)
    margins = [
        0.5 * (summed(params, p.chosen) - p.ref_chosen_logp)
        - 0.5 * (summed(params, p.rejected) - p.ref_rejected_logp)
        for p in PAIRS[:3]
    ]
    assert result["num_pairs"] == 3
    np.testing.assert_allclose(result["margin"], np.mean(margins), rtol=1e-4)
    np.testing.assert_allclose(result["accuracy"], np.mean(np.array(margins) > 0))
    with pytest.raises(ValueError, match="no pairs"):
        empty = [data.collate_preferences([PAIRS[3]], 8)]
        evaluate.preference_accuracy(MODEL, params, empty)


def test_preference_accuracy_of_a_reward_model(params):
    model = HistoryModel(num_labels=1)
    # Only the last token's own share differs much: score_t = its embedding + the past.
    scores = jnp.arange(11.0).at[2].set(4.0)[:, None] * jnp.ones((11, 11))
    params = params | {"embed": scores}
    pairs = [
        data.PreferenceExample(example([1, 9], 1), example([1, 3], 1)),
        data.PreferenceExample(example([1, 3], 1), example([1, 9, 9], 1)),
        data.PreferenceExample(example([1, 2], 1), example([1, 4], 1)),  # a tie
        PAIRS[3],
    ]
    batches = [data.collate_preferences(pairs, 8)]
    result = evaluate.preference_accuracy(model, params, batches)
    assert result["num_pairs"] == 3 and result["accuracy"] == 0.5


HOW = dict(key=jax.random.key(1), max_new_tokens=4)


def test_kl_to_itself_is_zero_and_to_another_is_what_the_samples_say(params):
    prompts = [[1, 2], [3], [4, 5, 6]]
    how = HOW | dict(temperature=2.0, stop_tokens=[7], batch_size=2)
    same = evaluate.kl_to_reference(MODEL, params, params, prompts, **how)
    np.testing.assert_allclose(same["kl_per_sequence"], 0.0, atol=1e-6)
    uniform = UniformModel()
    result = evaluate.kl_to_reference(
        MODEL, params, params, prompts, ref_model=uniform, **how
    )
    sampled = generate.generate(
        MODEL, params, prompts, **HOW, temperature=2.0, stop_tokens=[7]
    )
    ratio = np.where(sampled.mask, np.asarray(sampled.logps) + np.log(11), 0.0)
    k3 = np.where(sampled.mask, np.exp(-ratio) - 1 + ratio, 0.0)
    tokens = np.sum(sampled.mask)
    assert result["kl_num_tokens"] == tokens
    np.testing.assert_allclose(result["kl_per_sequence"], ratio.sum() / 3, rtol=1e-4)
    np.testing.assert_allclose(result["kl_per_token"], ratio.sum() / tokens, rtol=1e-4)
    np.testing.assert_allclose(result["kl_k3_per_sequence"], k3.sum() / 3, rtol=1e-4)
    np.testing.assert_allclose(result["kl_k3_per_token"], k3.sum() / tokens, rtol=1e-4)
    completions = generate.completion_lists(sampled)
    both, how = ((MODEL, uniform), (params, params)), dict(temperature=2.0)
    again = evaluate.kl_of_samples(*both, prompts, completions, batch_size=2, **how)
    assert again == result
    with pytest.raises(ValueError, match="temperature"):
        evaluate.kl_to_reference(MODEL, params, params, prompts, **HOW, temperature=0)


class LetterTokenizer:
    """One letter a token: a is 0, b is 1, ..., and k ends."""

    eos_token_id = 10

    def decode(self, ids, skip_special_tokens=False):
        kept = [i for i in ids if not (skip_special_tokens and i == 10)]
        return "".join(chr(ord("a") + i) for i in kept)


def prompt(text, **row):
    ids = np.array([ord(c) - ord("a") for c in text], np.int32)
    return data.PromptExample(ids, text, row)


def test_sample_texts_and_mean_reward(params):
    tokenizer = LetterTokenizer()
    prompts = [prompt("ab", n=1), [2, 3], prompt("cd", n=2)]
    texts = evaluate.sample_texts(MODEL, params, tokenizer, prompts, **HOW)
    ids = generate.generate_lists(
        MODEL, params, [[0, 1], [2, 3], [2, 3]], **HOW, stop_tokens=[10]
    )
    assert texts == [tokenizer.decode(row, True) for row in ids]
    seen = []

    def count(*batch):
        seen.append(batch)
        return [len(text) for text in batch[1]]

    result = evaluate.mean_reward(
        MODEL, params, tokenizer, prompts, rewards.checked(count), **HOW
    )
    assert seen == [(["ab", "cd", "cd"], texts, [{"n": 1}, {}, {"n": 2}])]
    lengths = [len(text) for text in texts]
    assert result["completions"] == texts and result["rewards"].tolist() == lengths
    np.testing.assert_allclose(result["mean"], np.mean(lengths))
    np.testing.assert_allclose(result["std"], np.std(lengths), atol=1e-6)
    again = evaluate.sample_texts(
        MODEL, params, tokenizer, prompts, **HOW, stop_tokens=range(11)
    )
    assert all(len(text) <= 1 for text in again)


def test_prompts_may_be_texts_or_rows(real_data, params):
    tokenizer = data.load_tokenizer(real_data / "stories260k")
    model = HistoryModel(vocab_size=512)
    params = model.init(jax.random.key(0))
    row = {"prompt": "Once upon a time"}
    texts = evaluate.sample_texts(model, params, tokenizer, ["Zoo", row], **HOW)
    ids = [tokenizer(text)["input_ids"] for text in ("Zoo", row["prompt"])]
    assert texts == evaluate.sample_texts(model, params, tokenizer, ids, **HOW)
    with pytest.raises(ValueError, match="prompt 1 of .* the model's context is 64"):
        how = HOW | dict(max_new_tokens=60)
        evaluate.sample_texts(model, params, tokenizer, ["Zoo", row], **how)

"""A reward model gives a completion one score, wherever it is asked."""

import numpy as np
import pytest

from jalign import data, rewards
from tests.rewards import seams


@pytest.mark.parametrize("kind", seams.KINDS)
@pytest.mark.parametrize("template", seams.TEMPLATES)
def test_training_eval_and_rollout_read_one_score(template, kind, tmp_path):
    scores, samples, exported = seams.all_scores(kind, template, tmp_path)
    assert np.std(scores["training"]) > 0.05  # so that another token shows
    for place, values in scores.items():
        np.testing.assert_allclose(
            values, scores["training"], atol=1e-4, err_msg=f"{place}, not training"
        )
    # The sampled ids themselves are read, closed by what ends a turn.
    read = rewards.scorer.judged_tokens(exported.tokenizer, samples)
    end = exported.tokenizer.convert_tokens_to_ids(seams.END.get(template, "</s>"))
    stopped = 0
    for ids, prompt, new in zip(
        read, samples.prompt_ids, samples.completion_ids, strict=True
    ):
        ended = new[-1] in samples.stop_tokens
        stopped += ended
        assert ids.tolist() == [*prompt, *(new[:-1] if ended else new), end]
    assert 0 < stopped < len(read)


@pytest.mark.parametrize("kind", seams.KINDS)
def test_a_reward_model_with_another_template_is_asked_in_its_own(kind):
    """The same vocabulary, so that ids alone could be taken for its own."""
    samples = seams.sample(kind, "chatml", 8)
    other = seams.tokenizer(kind, "mistral")
    read = rewards.scorer.judged_tokens(other, samples)
    rows = seams.pair_rows(
        samples._replace(completions=[text.strip() for text in samples.completions])
    )
    pairs, _ = data.preference_examples(rows, other, max_length=64)
    for ids, pair in zip(read, pairs, strict=True):
        assert ids.tolist() == pair.chosen.tokens.tolist()
        text = other.decode(ids)
        assert "im_start" not in text and text.count("<s>") == 1
    # So it is without ids, where only the rows tell what was asked.
    plain = samples._replace(prompt_ids=(), completion_ids=(), tokenizer=None)
    for ids, same in zip(rewards.scorer.judged_tokens(other, plain), read, strict=True):
        assert ids.tolist() == same.tolist()


def test_a_reward_model_of_others_is_read_where_its_template_ends():
    """A template that goes on behind the end of a turn, as transformers reads it."""
    samples = seams.sample("bytes", "chatml", 8)
    tokenizer = seams.tokenizer("bytes", "chatml")
    read = rewards.scorer.judged_tokens(tokenizer, samples)
    rows = seams.pair_rows(samples)
    for ids, row in zip(read, rows, strict=True):
        turns = row["prompt"] + row["chosen"]
        whole = tokenizer.apply_chat_template(turns, tokenize=True)["input_ids"]
        assert ids.tolist() == whole
        assert tokenizer.decode(ids).endswith("<|im_end|>\n")


def test_a_template_that_the_reward_model_refuses_is_named():
    samples = seams.sample("bytes", "chatml", 2)
    strict = seams.tokenizer("bytes", "chatml")
    strict.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(ValueError, match="row 0.*no users here"):
        rewards.scorer.judged_tokens(strict, samples)

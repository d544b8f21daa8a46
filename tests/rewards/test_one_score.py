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
        want = [*prompt, *(new[:-1] if ended else new), end]
        if template == "llama2" and not ended:
            want.insert(-1, new[0])  # the space that its template writes
        assert ids.tolist() == want
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


ENDLESS = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
ENDLESS += "{% if add_generation_prompt %}<|assistant|>{% endif %}"


@pytest.mark.parametrize("text", ["", " ", "a b"])
def test_an_empty_answer_is_read_as_well(text):
    """Also where the template ends a turn with nothing, and no token is trained."""
    for template in (ENDLESS, seams.TEMPLATES["chatml"]):
        made = seams.tokenizer("bytes", "chatml")
        samples = seams.sample("bytes", "chatml", 1)._replace(completions=[text])
        samples = samples._replace(prompt_ids=(), completion_ids=(), tokenizer=None)
        made.chat_template = template
        (ids,) = rewards.scorer.judged_tokens(made, samples)
        turns = [*samples.rows[0]["prompt"], {"role": "assistant", "content": text}]
        want = made.apply_chat_template(turns, tokenize=False)
        if template == ENDLESS:  # another template than asked with: the answer's text
            want = want[: len(want) - len(text)] + text.strip()
        assert made.decode(ids) == want


def test_ids_beyond_the_vocabulary_are_no_text():
    """A policy with a padded embedding may sample them; no reward model knows them."""
    samples = seams.sample("bytes", "chatml", 2)
    beyond = len(samples.tokenizer)
    ids = [[*samples.completion_ids[0][:1], beyond], samples.completion_ids[1]]
    read = rewards.scorer.judged_tokens(
        samples.tokenizer, samples._replace(completion_ids=ids)
    )
    assert max(read[0]) < beyond

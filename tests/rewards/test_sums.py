"""Tests for jalign/rewards/sums.py."""

import numpy as np
import pytest

from jalign import models, rewards
from jalign.rewards.sums import is_function, load_term, parse_rewards, weighted_sum

SOURCE = """
def length(prompts, completions, rows):
    return [len(c) for c in completions]

def row_number(prompts, completions, rows):
    return [row["n"] for row in rows]
"""


def test_terms_have_weights_names_and_sources():
    terms = parse_rewards(" gsm8k + -0.5 * a+b/style.py:polite + 1e-1*org/judge ")
    assert terms == (
        (1.0, "gsm8k", "gsm8k"),
        (-0.5, "polite", "a+b/style.py:polite"),
        (0.1, "judge", "org/judge"),
    )
    assert parse_rewards("runs/reward/model/")[0].name == "model"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected .*SOURCE"),
        ("gsm8k + ", "expected .*SOURCE"),
        ("a.py:f +  + b.py:f", "expected .*SOURCE"),
        ("a.py:f + 2*b.py:f", "two terms are called 'f'"),
    ],
)
def test_what_cannot_be_used_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_rewards(text)


def test_functions_add_up(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    terms = parse_rewards(f"{path}:length + 0.5*{path}:row_number")
    functions, judges = zip(*(load_term(t.source) for t in terms), strict=True)
    assert judges == (None, None)
    total = weighted_sum(functions, [t.weight for t in terms])
    got = total(["", ""], ["ab", "c"], [{"n": 4}, {"n": 6}])
    assert got.dtype == np.float32 and got.tolist() == [4.0, 4.0]


def test_a_verifier_goes_by_its_name():
    function, judge = load_term("gsm8k")
    assert judge is None
    assert function([""], ["#### 3"], [{"answer": "3"}]).tolist() == [1.0]
    for name, hint in (("gsm8", "did you mean 'gsm8k'"), ("length", "not built in")):
        with pytest.raises(ValueError, match=hint):
            load_term(name)


def test_a_reward_is_a_function_or_a_checkpoint():
    assert is_function("some/reward.py:score") and is_function("C:/reward.py:score")
    assert not is_function("org/reward-model") and not is_function("out/model")


def test_a_checkpoint_comes_with_its_model(tmp_path, key):
    from tests.train.ppo_world import make_tokenizer

    model = models.Model(models.ModelConfig(16, 32, 48, 1, 4, 2, 8, num_labels=1))
    models.save(tmp_path, model, model.init(key), make_tokenizer())
    function, judge = load_term(str(tmp_path))
    assert judge is not None and judge.model.config.num_labels == 1
    again = rewards.model_reward(*judge)
    args = (["a b"], ["c"], [{}])
    np.testing.assert_array_equal(function(*args), again(*args))


def test_what_is_quick_to_refuse_is_refused_before_a_checkpoint_is_read(
    tmp_path, monkeypatch
):
    from jalign.rewards import sums

    monkeypatch.setattr(sums, "load_pretrained", pytest.fail)
    terms = rewards.parse_rewards(f"{tmp_path} + gsm8k + {tmp_path}/none.py:f")
    with pytest.raises(FileNotFoundError, match=r"none\.py"):
        rewards.load_terms(terms)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        rewards.load_terms(terms[:2])

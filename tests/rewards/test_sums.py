"""Tests for jalign/rewards/sums.py."""

import numpy as np
import pytest

from jalign import models, rewards
from jalign.rewards.sums import load_term, parse_rewards, weighted_sum

SOURCE = """
def length(prompts, completions, rows):
    return [len(c) for c in completions]

def row_number(prompts, completions, rows):
    return [row["n"] for row in rows]
"""


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


def odd(completions, **kwargs):
    return [None if len(text) % 2 else 1.0 for text in completions]


def test_a_row_that_is_not_judged_adds_nothing(caplog):
    """As in TRL, whose rewards are summed by nansum, and the means by nanmean."""
    batch = [""] * 3, ["ab", "c", "d"], [{}, {}, {}]
    both = rewards.load_reward([odd, (0.5, lambda p, c, r: [4.0] * len(r))])
    assert both(*batch).tolist() == [3.0, 2.0, 2.0] and not caplog.records
    alone = rewards.load_reward(odd)(*batch)
    assert alone.tolist() == [1.0, 0.0, 0.0]
    assert "2 of 3 completions were judged by no reward function" in caplog.text
    columns = rewards.load_terms(parse_rewards(odd)).function(*batch)
    assert rewards.mean_of_judged(columns[:, 0]) == 1.0
    assert rewards.mean_of_judged(columns[1:, 0]) == 0.0
    with pytest.raises(ValueError, match="row 0 adds up"):
        rewards.add_up(np.array([[3e38, np.nan]], np.float32), [10.0, 1.0])

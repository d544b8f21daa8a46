"""Tests for jalign/rewards/terms.py: what a --reward may say."""

import functools

import pytest

from jalign.rewards import Ensemble, RewardTerm
from jalign.rewards.terms import is_function, parse_rewards, single_sources


def test_terms_have_weights_names_and_sources():
    terms = parse_rewards(" gsm8k + -0.5 * a+b/style.py:polite + 1e-1*org/judge ")
    assert [term[:3] for term in terms] == [
        (1.0, "gsm8k", "gsm8k"),
        (-0.5, "polite", "a+b/style.py:polite"),
        (0.1, "judge", "org/judge"),
    ]
    assert parse_rewards("runs/reward/model/")[0].name == "model"


def test_names_are_as_long_as_it_takes():
    def names(text):
        return [term.name for term in single_sources(parse_rewards(text))]

    assert names("min(runs/a/model, runs/b/model, c)") == ["a/model", "b/model", "c"]
    assert names("x/a.py:f + 2*x/b.py:f + y/a.py:g") == ["a.py:f", "b.py:f", "g"]
    assert names("model + x/model + /y/model") == ["model", "x/model", "y/model"]


@pytest.mark.parametrize(
    ("text", "weight", "how", "members", "less"),
    [
        ("mean(a, b,c)", 1, "mean", ["a", "b", "c"], (0, "")),
        ("min(my runs/a (1)/m, f.py:g)", 1, "min", ["my runs/a (1)/m", "f.py:g"], ()),
        ("0.5*min(a, b)", 0.5, "min", ["a", "b"], ()),
        ("mean(a, b) - 0.5*std", 1, "mean", ["a", "b"], (0.5, "std")),
        ("mean(a, b)-2 * var", 1, "mean", ["a", "b"], (2, "var")),
        ("mean(a, b) - std", 1, "mean", ["a", "b"], (1, "std")),
        ("-2*( mean(a, b) - 0.5*std )", -2, "mean", ["a", "b"], (0.5, "std")),
    ],
)
def test_ensembles(text, weight, how, members, less):
    first, term, last = parse_rewards(f"gsm8k + {text} + 0.1*x.py:z")
    assert (first.name, last.name, last.weight) == ("gsm8k", "z", 0.1)
    assert (term.weight, term.name, term.source) == (weight, how, text)
    assert term.ensemble is not None and term.ensemble.how == how
    assert [member.source for member in term.ensemble.members] == members
    assert term.ensemble[2:] == (less or (0, ""))


def test_two_ensembles_and_functions_have_names_of_their_own():
    def f(prompts, completions, rows):
        raise AssertionError("not asked")

    terms = parse_rewards(["min(a, b) + min(c, d)", f, (0.5, f), lambda *b: b])
    assert [t.name for t in terms] == ["min", "min2", "f", "f2", "lambda"]
    assert [t.weight for t in terms] == [1, 1, 1, 0.5, 1]
    assert parse_rewards((2, functools.partial(f)))[0][:2] == (2.0, "f")
    assert parse_rewards((2, "0.5*min(a, b) + c"))[0].weight == 1.0
    assert str(terms[0].ensemble) == "min(a, b)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected .*SOURCE"),
        ("gsm8k + ", "expected .*SOURCE"),
        ("a.py:f +  + b.py:f", "expected .*SOURCE"),
        ("a.py:f + 2*a.py:f", "'a.py:f' is given twice"),
        ("min(a, b) + a", "'a' is given twice"),
        ("gsm8k + min(a, b", "'gsm8k . min.a, b': a parenthesis is not closed"),
        ("(mean(a, b) - std", "a parenthesis is not closed"),
        ("min(a)", "'min.a.': an ensemble needs two members"),
        ("min(a, a)", "two members or more, all different"),
        ("min(a, , b)", "'' is no member"),
        ("min(a, 0.5*b)", "'0.5[*]b' is no member.*without a weight"),
        ("min(a, mean(b, c))", "'mean.b, c.' is no member"),
        ("min(a, b) - 0.5*std", "behind min.* comes nothing, not '- 0.5[*]std'"),
        ("mean(a, b) - 0.5*sd", "behind mean.* comes - C[*]std, - C[*]var or nothing"),
        ("mean(a, b)/model", "behind mean"),
        ("0.5*mean(a, b) - 2*std", "W[*].mean.*- C[*]std"),
        ([], "the list is empty"),
        (["gsm8k", 3], "reward 3 is a int"),
        ({"gsm8k": 1.0}, "is a dict: expected"),
    ],
)
def test_what_cannot_be_used_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_rewards(text)


def test_a_reward_is_a_function_or_a_checkpoint():
    assert is_function("some/reward.py:score") and is_function("C:/reward.py:score")
    assert is_function(len) and RewardTerm(1.0, "len", len).ensemble is None
    assert not is_function("org/reward-model") and not is_function("out/model")
    assert Ensemble("mean", (), 0.5, "std").penalty == 0.5

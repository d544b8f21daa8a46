"""Tests for the ensembles of jalign/rewards/sums.py."""

import numpy as np
import pytest

from jalign import models, rewards
from jalign.rewards.sums import column_weights
from jalign.rewards.terms import parse_rewards

VALUES = np.array([[1.0, 4.0, 7.0, 9.0], [2.0, 2.0, -1.0, 8.0]], np.float32)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("min(a, b, c)", [1.0, -1.0]),
        ("mean(a, b, c)", [4.0, 1.0]),
        # Deviations of the population: of (1, 4, 7) the variance is 6, of (2, 2, -1) 2.
        ("mean(a, b, c) - 0.5*std", [4 - 0.5 * 6**0.5, 1 - 0.5 * 2**0.5]),
        ("mean(a, b, c) - 0.5*var", [1.0, 0.0]),
    ],
)
def test_closed_forms(text, expected):
    """Coste et al. 2023, equations of section 3: mean, WCO, UWO (of the variance)."""
    terms = parse_rewards(f"0.5*({text}) + d")
    columns = rewards.combine(terms, VALUES)
    name = text[: text.index("(")]
    weights = {name: 0.5, "d": 1.0, "a": 0.0, "b": 0.0, "c": 0.0}
    assert column_weights(terms) == weights | {f"{name}/member_std": 0.0}
    assert columns.dtype == np.float32
    spread = np.sqrt([[6.0], [2.0]])
    np.testing.assert_allclose(
        columns,
        np.c_[expected, VALUES[:, 3], VALUES[:, :3], spread],
        rtol=4 * np.finfo(np.float32).eps,
    )
    total = rewards.add_up(columns, list(column_weights(terms).values()))
    np.testing.assert_allclose(total, 0.5 * np.array(expected) + [9, 8], rtol=1e-6)


def test_every_member_judges_every_row():
    with pytest.raises(ValueError, match=r"min\(a, b\): b gave None for row 1"):
        values = np.array([[1.0, 2.0], [3.0, np.nan]], np.float32)
        rewards.combine(parse_rewards("min(a, b)"), values)


def test_checkpoints_as_members_are_read_as_each_of_them_is(tmp_path, key):
    """Two reward models of other vocabularies, and a function, as one reward."""
    import jax

    from tests.rewards import seams
    from tests.train.ppo_world import make_tokenizer

    alone = []
    for name, made, config in (
        ("x", make_tokenizer(), models.ModelConfig(16, 32, 48, 1, 4, 2, 8)),
        (
            "y",
            seams.tokenizer("bytes", "text"),
            seams.config_of(seams.tokenizer("bytes", "text")),
        ),
    ):
        model = models.Model(config).with_scalar_head()
        path = tmp_path / f"seed {name}" / "model"
        models.save(path, model, model.init(jax.random.fold_in(key, len(alone))), made)
        alone.append(path)
    batch = ["a b", "c"], ["c d", "a"], [{}, {}]
    each = np.stack([rewards.load_reward(str(path))(*batch) for path in alone], axis=1)
    text = f"min({alone[0]}, {alone[1]})"
    loaded = rewards.load_terms(parse_rewards(text))
    assert [*loaded.weights] == [
        "min",
        "seed x/model",
        "seed y/model",
        "min/member_std",
    ]
    assert all(model is not None for model in loaded.reward_models)
    np.testing.assert_array_equal(loaded.function(*batch)[:, 1:3], each)
    got = rewards.load_reward(f"2*{text} + gsm8k_format")(*batch)
    np.testing.assert_allclose(got, 2 * each.min(axis=1), rtol=1e-6)

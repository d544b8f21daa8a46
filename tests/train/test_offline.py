"""The three recipes, from a real checkpoint and real rows to OUT, and again."""

import json

import pytest

from jalign import data, models, train
from tests.train import tiny


def settings(real_data, rows, out):
    return dict(
        model=str(real_data / "stories260k"),
        data=str(rows),
        eval_data=str(rows),
        out=str(out),
        steps=3,
        batch_size=2,
        max_length=96,
        mesh="fsdp=1",
        bad_rows="skip",
        checkpoint_every=2,
        optim=train.OptimConfig(learning_rate=1e-3),
    )


def shortest(source, target, count):
    lines = sorted(source.read_text(encoding="utf-8").splitlines(), key=len)[:count]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


CASES = {
    "sft": (train.SFTConfig, "alpaca_eval_sft_train.jsonl", "eval_loss", -1),
    "reward": (train.RewardConfig, "alpaca_eval_preferences_train.jsonl", None, 1),
    "dpo": (train.DPOConfig, "alpaca_eval_preferences_train.jsonl", "eval_margin", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_recipe_end_to_end(kind, real_data, tmp_path):
    config_class, name, figure, sign = CASES[kind]
    rows = shortest(real_data / name, tmp_path / "rows.jsonl", 24)
    out = tmp_path / "out"
    config = config_class(**settings(real_data, rows, out))
    run = getattr(train, f"run_{kind}")
    summary = run(config)
    assert summary["steps"] == 3
    if figure:
        assert sign * (summary[figure] - summary[f"{figure}_before"]) > 0
    found = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found] == [1, 2, 3]
    assert found[-1]["learning_rate"] < found[0]["learning_rate"]
    assert (out / "report.html").is_file()
    assert not tiny.unexplained(out)
    model, params = models.load(out / "model")
    assert model.config.num_labels == (kind == "reward")
    data.load_tokenizer(out / "model")
    # The same command again has nothing left to train and ends in the same weights.
    assert run(config)["num_tokens"] == summary["num_tokens"]
    assert tiny.same(params, models.load(out / "model")[1])

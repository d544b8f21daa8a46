"""`jalign demo`: load, SFT, reward model, PPO, DPO, and a judgement by the truth.

It goes through the same functions as `jalign sft`, `reward`, `ppo` and `dpo`, on a
model of 0.8M parameters, and ends with a table and OUT/report.html.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jalign import data, evaluate, report, train
from jalign.demo import task
from jalign.paths import located, write_text
from jalign.pretrained import Pretrained, load_pretrained
from jalign.texts import sample_completions
from jalign.train.online_config import CriticConfig, ScoreOptions

_log = logging.getLogger("jalign.demo")

ASSETS = Path(__file__).parent / "assets"
"""model/, and {sft,preferences,prompts}_{train,heldout}.jsonl."""
PROMPT_LENGTH, REPLY_LENGTH = 10, 42  # tokens; the longest rows have 10 and 41
MAX_LENGTH = PROMPT_LENGTH + REPLY_LENGTH
FOLDERS = {
    "base": "",
    "SFT": "sft",
    "reward model": "reward",
    "PPO": "ppo",
    "DPO": "dpo",
}
# A minibatch's gradient has a norm of about 0.4, and now and then, where a reply is
# garbage, of 18: clipped at 1 it still threw the policy 10 to 20 nats away at once,
# since Adam divides by what is usual. So clip below the usual, and keep b2 low.
PPO_RATES = {"end_fraction": 0.25, "b2": 0.95, "eps": 1e-4, "max_grad_norm": 0.2}
REPLIES = 2  # of a model to each held-out prompt
SHOWN = 6  # prompts with their replies on the page
NOTE = (
    "A LLaMA of 0.8M parameters learns to answer, then what to prefer: replies that "
    "are about the person and the thing of the prompt and end well. Little more than "
    "half the demonstrations are such. PPO follows the trained reward model, DPO the "
    "same preference pairs, and each keeps its best checkpoint by held-out rows; the "
    "shares below come from none of these, but from the rule that made the data, on "
    "held-out prompts at temperature 1."
)


@dataclass(frozen=True)
class DemoConfig:
    """Aligns the embedded model with embedded preferences, and judges the outcome."""

    out: str = "runs/demo"
    """Directory for sft/, reward/, ppo/, dpo/, table.json and report.html."""
    seed: int = 0
    """Of the order of the rows, the fresh heads and the sampling."""
    sft_steps: int = 144
    """Of supervised fine-tuning."""
    reward_steps: int = 340
    """Of the reward model."""
    ppo_steps: int = 56
    """Iterations: 64 completions and the updates on them."""
    dpo_steps: int = 160
    """Of direct preference optimization."""
    eval_prompts: int = 256
    """Held-out prompts that every model answers twice; at most 256."""

    def __post_init__(self):
        for field in dataclasses.fields(self)[2:]:
            value = getattr(self, field.name)
            if value < 1:
                raise ValueError(f"{field.name} must be >= 1, got {value}")


def run_demo(config: DemoConfig) -> str:
    """Runs the demo; returns the table for the terminal."""
    table = task.format_table(run_stages(config))
    return f"{table}\n\nreport: {located(config.out) / 'report.html'}"


def run_stages(config: DemoConfig) -> list[dict[str, Any]]:
    """Runs every stage, judges every model, writes OUT/table.json and report.html.

    Returns: a row for each model, with "model"; "preferred", the share of held-out
      prompts whose reply the judge prefers, and its parts "well formed", "on topic"
      and "happy"; "KL to SFT" in nats a reply; "reward accuracy" on held-out pairs;
      "seconds" of training. None where a figure does not apply.
    """
    out, configs = located(config.out), stage_configs(config)
    summaries: dict[str, dict[str, Any]] = {}
    seconds: dict[str, float] = {}
    for number, (name, (function, stage)) in enumerate(configs.items(), 1):
        _log.info("%d/%d %s", number, len(configs) + 1, name)
        start = time.perf_counter()
        summaries[name] = function(stage)
        seconds[name] = time.perf_counter() - start
    _log.info("%d/%d judging", len(configs) + 1, len(configs) + 1)
    start = time.perf_counter()
    prompts = held_out_prompts(config.eval_prompts)
    rows, replies = judge_models(out, prompts, config.seed)
    for row in rows:
        name = row["model"]
        row["reward accuracy"] = summaries.get(name, {}).get("eval_accuracy")
        row["seconds"] = seconds.get(name)
    seconds["judging"] = time.perf_counter() - start
    write_text(out / "table.json", json.dumps(rows, indent=1))
    stages = {name: dataclasses.asdict(stage) for name, (_, stage) in configs.items()}
    report.write_report(
        out,
        title="jalign demo: one small model, aligned twice",
        note=NOTE,
        metrics_rows={
            name: report.read_metrics(out / FOLDERS[name] / "metrics.jsonl")
            for name in configs
        },
        kept_step={
            name: summary["kept_step"]
            for name, summary in summaries.items()
            if "kept_step" in summary
        },
        samples=task.samples_of(prompts[:SHOWN], replies),
        timings=seconds,
        config=dataclasses.asdict(config) | stages,
        **task.findings(rows, sum(seconds.values())),
    )
    for name in task.worse(rows):
        _log.warning("%s ended worse than what it was made from", name)
    return rows


def stage_configs(config: DemoConfig) -> dict[str, tuple[Callable, Any]]:
    """Name -> (recipe, its config), in the order they run."""
    out = located(config.out)
    sft = str(out / "sft" / "model")

    def stage(
        name: str,
        files: str,
        steps: int,
        learning_rate: float,
        *,
        keep_best: str | None = None,
        times: int = 3,
        **optim: Any,
    ) -> dict[str, Any]:
        """What stages share; with so many measurements where the best one is kept."""
        watched = {"eval_every": -(-steps // times), "keep_best": keep_best}
        return {
            "data": str(ASSETS / f"{files}_train.jsonl"),
            "eval_data": str(ASSETS / f"{files}_heldout.jsonl"),
            "out": str(out / name),
            "seed": config.seed,
            "max_length": MAX_LENGTH,
            "steps": steps,
            "optim": train.OptimConfig(learning_rate=learning_rate, **optim),
        } | (watched if keep_best else {})

    return {
        "SFT": (
            train.run_sft,
            train.SFTConfig(
                model=str(ASSETS / "model"),
                batch_size=32,
                **stage("sft", "sft", config.sft_steps, 2e-3, schedule="cosine"),
            ),
        ),
        "reward model": (
            train.run_reward,
            train.RewardConfig(
                model=sft,
                batch_size=16,
                reward=train.RewardOptions(center_coef=0.01),
                **stage(
                    "reward",
                    "preferences",
                    config.reward_steps,
                    8e-4,
                    keep_best="log_loss",
                    schedule="cosine",
                    warmup_steps=config.reward_steps // 10,
                    b2=0.98,
                ),
            ),
        ),
        "PPO": (
            train.run_ppo,
            train.PPOConfig(
                model=sft,
                reward=str(out / "reward" / "model"),
                stop_kl=8.0,
                batch_size=64,
                ppo=ppo_options(),
                **stage(
                    "ppo",
                    "prompts",
                    config.ppo_steps,
                    3e-4,
                    keep_best="reward",
                    times=4,
                    # The first updates are small: their critic has seen nothing yet.
                    warmup_steps=config.ppo_steps // 4,
                    **PPO_RATES,
                ),
            ),
        ),
        "DPO": (
            train.run_dpo,
            train.DPOConfig(
                model=sft,
                batch_size=16,
                dpo=train.DPOOptions(loss="dpo:beta=0.1 + 4*sft"),
                **stage(
                    "dpo",
                    "preferences",
                    config.dpo_steps,
                    3e-4,
                    keep_best="log_loss",
                    schedule="cosine",
                ),
            ),
        ),
    }


def ppo_options() -> train.PPOOptions:
    """PPO's dials for a task of about thirty tokens a reply."""
    return train.PPOOptions(
        num_epochs=1,
        num_minibatches=4,
        gae_lambda=0.95,
        critic=CriticConfig(critic_learning_rate=1e-3),
        rewards=ScoreOptions(missing_eos_penalty=1.0),
        sampling=train.SampleConfig(max_new_tokens=REPLY_LENGTH),
    )


def judge_models(
    out: Path, prompts: Sequence[str], seed: int
) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """(a row for each model, name -> replies to the prompts, again and again)."""
    reference = load_pretrained(out / FOLDERS["SFT"] / "model")
    rows, replies, figures = [], {}, {}
    for name, folder in FOLDERS.items():
        if name == "reward model":  # it answers nothing
            figures = dict.fromkeys(figures)
        else:
            path = (out / folder if folder else ASSETS) / "model"
            figures, replies[name] = judge_model(path, reference, prompts, seed)
        rows.append({"model": name} | figures)
    return rows, replies


def held_out_prompts(count: int) -> list[str]:
    """The first held-out prompts, as text."""
    rows = data.load_rows(str(ASSETS / "prompts_heldout.jsonl"), limit=count)
    return [row["prompt"] for row in rows]


def judge_model(
    folder: Path, reference: Pretrained, prompts: Sequence[str], seed: int
) -> tuple[dict[str, float], list[str]]:
    """Samples replies at temperature 1, all prompts again and again; judges them."""
    asked = [*prompts] * REPLIES
    policy = load_pretrained(folder)
    samples = sample_completions(
        *policy, asked, key=jax.random.key(seed), max_new_tokens=REPLY_LENGTH
    )
    texts = samples.completions
    verdicts = [task.judge(p, t) for p, t in zip(asked, texts, strict=True)]
    kl = evaluate.kl_of_samples(
        (policy.model, reference.model),
        (policy.params, reference.params),
        samples.prompt_ids,
        samples.completion_ids,
    )
    figures = {
        name.replace("_", " "): sum(getattr(v, name) for v in verdicts) / len(verdicts)
        for name in ("preferred", "well_formed", "on_topic", "happy")
    }
    return figures | {"KL to SFT": kl["kl_per_sequence"]}, texts

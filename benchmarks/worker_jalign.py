"""jalign's share of the comparison, written as its notebooks are."""

import functools
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jalign as ja
from benchmarks import assets, measure, rewards, settings
from benchmarks.measure import Outcome
from jalign.train import SampleConfig
from jalign.train.online_config import KLConfig


def sft(model: str, piece: str = "sft") -> Outcome:
    """Full rows: nothing to pack, nothing padded."""
    rows = assets.read_rows(model)["sft"]
    lm, params = ja.models.load(assets.folder(model) / "model")
    examples = [
        ja.data.Example(np.array(ids, np.int32), np.ones(len(ids), bool))
        for ids in rows
    ]
    step, state = make_step(piece, ja.train.make_sft_objective(lm), params, lm)
    spans, losses = measure.laps(
        train(step, state, batches(examples, ja.data.collate_tokens))
    )
    tokens = settings.TIMED_STEPS * settings.ROWS * settings.LENGTH
    return outcome(spans, losses, tokens)


def reward(model: str) -> Outcome:
    """From a checkpoint with a scalar head that all frameworks share."""
    lm, params = ja.models.load(assets.folder(model) / "reward")
    pairs, tokens = load_pairs(model)
    step, state = make_step("reward", ja.train.make_reward_objective(lm), params)
    spans, losses = measure.laps(
        train(step, state, batches(pairs, ja.data.collate_preferences, pack_rows=1))
    )
    return outcome(spans, losses, tokens)


def dpo(model: str, piece: str = "dpo") -> Outcome:
    """As notebooks/02_dpo.ipynb: the reference's log-probabilities, then the step."""
    lm, reference = ja.models.load(assets.folder(model) / "model")
    pairs, tokens = load_pairs(model)
    reference_logps = ja.train.make_reference_fn(lm)

    def with_reference():
        for batch in batches(pairs, ja.data.collate_preferences, pack_rows=1):
            chosen, rejected = reference_logps(reference, batch)
            yield batch._replace(ref_chosen_logps=chosen, ref_rejected_logps=rejected)

    objective = ja.train.make_dpo_objective(lm, beta=settings.BETA)
    start = reference if lora(piece) else jax.tree.map(jnp.copy, reference)
    step, state = make_step(piece, objective, start, lm)
    spans, losses = measure.laps(train(step, state, with_reference()))
    return outcome(spans, losses, tokens)


def sample(model: str) -> Outcome:
    """No stop token: every row runs to the limit."""
    prompts = assets.read_rows(model)["prompts"][: settings.FIXED_ROWS]
    return sampling(assets.folder(model) / "model", prompts, (), None)


def early(model: str) -> Outcome:
    """Rows of known, different lengths."""
    rows = assets.read_rows(model)
    folder = assets.folder(model) / "chain"
    return sampling(
        folder, rows["early_prompts"], (rows["eos"],), rows["early_lengths"]
    )


def lora(piece: str) -> bool:
    """Whether a piece trains adapters, and leaves the parameters alone."""
    return piece.startswith("lora-")


def make_step(piece: str, objective, params, lm=None):
    """(step, first state) with the settings that all frameworks share."""
    frozen = None
    if lora(piece):
        config = ja.models.lora.LoraConfig(**settings.LORA)
        adapters = ja.models.lora.init(lm, params, config, jax.random.key(0))
        trained, scales = ja.models.lora.trainable(adapters)
        params, frozen = trained, ja.models.lora.join(params, scales)
    optim = ja.train.OptimConfig(
        learning_rate=settings.LEARNING_RATE[piece],
        schedule="constant",
        max_grad_norm=settings.MAX_GRAD_NORM,
    )
    steps = settings.WARM_STEPS + settings.TIMED_STEPS
    tx, schedule = ja.train.make_optimizer(optim, steps)
    state = ja.train.init_state(params, tx, jax.random.key(0))
    step = ja.train.make_train_step(objective, tx, schedule=schedule)
    return functools.partial(step, frozen=frozen), state


def batches(examples, collate, pack_rows=0):
    """The rows in their order, twice: once to warm up, once for the clock."""
    for _ in range(2):
        yield from ja.data.make_eval_loader(
            examples,
            batch_size=settings.ROWS,
            collate=collate,
            max_length=settings.LENGTH,
            pack_rows=pack_rows,
        )


def train(step, state, source):
    """Yields each step's loss, once it is there."""
    for batch in source:
        state, metrics = step(state, batch)
        yield float(metrics["loss"])


def load_pairs(model: str):
    """(PreferenceExamples, useful tokens of the timed steps)."""
    rows = assets.read_rows(model)["pairs"]
    tokenizer = ja.data.load_tokenizer(assets.folder(model) / "model")
    texts = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows]
    pairs, _ = ja.data.preference_examples(texts, tokenizer, max_length=settings.LENGTH)
    return pairs, measure.pair_tokens(rows)


def outcome(spans, losses, tokens: int) -> Outcome:
    """Of a training piece."""
    return Outcome(
        spans,
        settings.WARM_STEPS,
        tokens,
        settings.TIMED_STEPS * settings.ROWS,
        losses[:5],
    )


def sampling(folder, prompts, stop_tokens, lengths) -> Outcome:
    """Calls `generate` with another key each time; checks the lengths where known."""
    lm, params = ja.models.load(folder)

    def calls():
        for number in range(1 + settings.TIMED_STEPS):
            completion = ja.generate.generate(
                lm,
                params,
                prompts,
                key=jax.random.key(number),
                max_new_tokens=settings.NEW_TOKENS,
                stop_tokens=stop_tokens,
            )
            yield [len(ids) for ids in ja.generate.completion_lists(completion)]

    spans, counts = measure.laps(calls())
    measure.check_lengths(counts, lengths)
    return Outcome(
        spans,
        1,
        sum(map(sum, counts[1:])),
        settings.TIMED_STEPS * len(prompts),
    )


def ppo(model: str) -> Outcome:
    """`jalign ppo`: a rollout, then one update of policy and critic."""
    config = ja.train.PPOConfig(
        **online_options("ppo", model, batch_size=settings.QUESTIONS),
        ppo=ja.train.PPOOptions(
            num_epochs=1,
            kl=KLConfig(kl_coef=settings.KL_COEF),
            sampling=SampleConfig(max_new_tokens=settings.ONLINE_NEW_TOKENS),
        ),
    )
    return online_run(ja.train.run_ppo, config)


def grpo(model: str) -> Outcome:
    """`jalign grpo`: a rollout of groups, then one update."""
    config = ja.train.GRPOConfig(
        **online_options("grpo", model, batch_size=settings.ONLINE_PROMPTS),
        grpo=ja.train.GRPOOptions(
            group_size=settings.GROUP_SIZE,
            beta=settings.KL_COEF,
            sampling=SampleConfig(max_new_tokens=settings.ONLINE_NEW_TOKENS),
        ),
    )
    return online_run(ja.train.run_grpo, config)


def online_options(piece: str, model: str, batch_size: int) -> dict:
    """The settings that all frameworks share, and a directory of its own."""
    folder = assets.folder(model)
    reward = f"{Path(rewards.__file__)}:distinct"
    return {
        "model": str(folder / "model"),
        "data": str(folder / "prompts.jsonl"),
        "reward": reward,
        "out": str(folder / f"jalign-{piece}"),
        "steps": settings.ONLINE_WARM + settings.ONLINE_TIMED,
        "batch_size": batch_size,
        "max_length": settings.PROMPT_LENGTH + settings.ONLINE_NEW_TOKENS,
        "checkpoint_every": 0,
        "optim": ja.train.OptimConfig(
            learning_rate=settings.LEARNING_RATE[piece],
            schedule="constant",
            max_grad_norm=settings.MAX_GRAD_NORM,
        ),
    }


def online_run(run, config) -> Outcome:
    """Runs a recipe from the start; the times are those of its metrics.jsonl."""
    shutil.rmtree(config.out, ignore_errors=True)
    run(config)
    rows = ja.report.read_metrics(f"{config.out}/metrics.jsonl")
    last = rows[-1]
    notes = {k: last[k] for k in ("time/rollout", "time/update") if k in last}
    spans = measure.Spans([row["step_time"] for row in rows], [])
    return measure.online(spans, **notes)


PIECES = {
    "sft": sft,
    "reward": reward,
    "dpo": dpo,
    "lora-sft": functools.partial(sft, piece="lora-sft"),
    "lora-dpo": functools.partial(dpo, piece="lora-dpo"),
    "sample": sample,
    "early": early,
    "grpo": grpo,
    "ppo": ppo,
}

if __name__ == "__main__":
    ja.sharding.give_back_compiler_memory()  # as the command does
    sys.exit(measure.main(PIECES, "jax", "flax", "optax"))

"""TRL's share, through its trainers and `generate`, as its documentation shows them."""

import functools
import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, GenerationConfig, TrainerCallback
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from benchmarks import assets, measure, rewards, settings
from benchmarks.measure import Outcome
from benchmarks.trl_options import options


class Laps(TrainerCallback):
    """Notes when each step ended, and the loss that it logged."""

    def __init__(self):
        self.ends, self.losses = [], []

    def on_train_begin(self, args, state, control, **kwargs):
        """The clock starts."""
        self.ends.append(measure.now())

    def on_step_end(self, args, state, control, **kwargs):
        """A step is done."""
        self.ends.append(measure.now())

    def on_log(self, args, state, control, logs=None, **kwargs):
        """The loss of the last step, and not the summary at the end."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def shared(piece: str, model: str) -> dict:
    """What every trainer is given."""
    out = str(assets.folder(model) / f"trl-{piece}")
    return options(piece, out, settings.WARM_STEPS + settings.TIMED_STEPS)


def sft(model: str, piece: str = "sft") -> Outcome:
    """Rows of token ids, which the trainer takes as they are."""
    rows = assets.read_rows(model)["sft"] * 2
    trainer = SFTTrainer(
        model=str(assets.folder(model) / "model"),
        args=SFTConfig(**shared(piece, model)),
        peft_config=adapters(piece),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
    )
    tokens = settings.TIMED_STEPS * settings.ROWS * settings.LENGTH
    return train(trainer, tokens)


def reward(model: str) -> Outcome:
    """Bradley-Terry, from the shared checkpoint with its scalar head."""
    rows = assets.read_rows(model)["pairs"]
    trainer = RewardTrainer(
        model=str(assets.folder(model) / "reward"),
        args=RewardConfig(**shared("reward", model)),
        train_dataset=text_pairs(rows),
    )
    return train(trainer, measure.pair_tokens(rows))


def dpo(model: str, piece: str = "dpo") -> Outcome:
    """The reference's log-probabilities in every step, as by default."""
    rows = assets.read_rows(model)["pairs"]
    trainer = DPOTrainer(
        model=str(assets.folder(model) / "model"),
        args=DPOConfig(beta=settings.BETA, **shared(piece, model)),
        peft_config=adapters(piece),
        train_dataset=text_pairs(rows),
    )
    return train(trainer, measure.pair_tokens(rows))


def adapters(piece: str):
    """PEFT's config of the pieces that train adapters; None of the others."""
    if not piece.startswith("lora-"):
        return None
    from peft import LoraConfig

    rank, alpha = settings.LORA["rank"], settings.LORA["alpha"]
    return LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear"
    )


def text_pairs(rows) -> Dataset:
    """The pairs as text, twice."""
    return Dataset.from_list(
        [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows * 2]
    )


def train(trainer, tokens: int) -> Outcome:
    """Trains with the clock on."""
    laps = Laps()
    trainer.add_callback(laps)
    trainer.train()
    return measure.trained(laps.ends, laps.losses, tokens)


def grpo(model: str) -> Outcome:
    """A rollout and one update, in which a step has all completions."""
    rows = assets.read_rows(model)["questions"]
    completions = settings.ONLINE_PROMPTS * settings.GROUP_SIZE
    given = shared("grpo", model)
    del given["max_length"]
    given |= {
        "per_device_train_batch_size": completions,
        "max_steps": settings.ONLINE_WARM + settings.ONLINE_TIMED,
    }
    config = GRPOConfig(
        num_generations=settings.GROUP_SIZE,
        max_completion_length=settings.ONLINE_NEW_TOKENS,
        beta=settings.KL_COEF,
        **given,
    )
    trainer = GRPOTrainer(
        model=str(assets.folder(model) / "model"),
        reward_funcs=rewards.distinct,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": text} for text in rows]),
    )
    laps = Laps()
    trainer.add_callback(laps)
    trainer.train()
    return measure.online(measure.spans(laps.ends))


def sample(model: str) -> Outcome:
    """No stop token: every row runs to the limit."""
    prompts = assets.read_rows(model)["prompts"][: settings.FIXED_ROWS]
    return sampling(assets.folder(model) / "model", prompts, None, None)


def early(model: str) -> Outcome:
    """Rows of known, different lengths."""
    rows = assets.read_rows(model)
    folder = assets.folder(model) / "chain"
    return sampling(folder, rows["early_prompts"], rows["eos"], rows["early_lengths"])


def sampling(folder, prompts, eos, lengths) -> Outcome:
    """`generate` of transformers, which TRL samples with where there is no vLLM."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=settings.NEW_TOKENS,
        eos_token_id=eos,
        pad_token_id=0,
    )
    ids = torch.tensor(prompts)

    def calls():
        for number in range(1 + settings.TIMED_STEPS):
            torch.manual_seed(number)
            with torch.inference_mode():
                out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
            yield [length_of(row, eos) for row in out[:, ids.shape[1] :].tolist()]

    spans, counts = measure.laps(calls())
    measure.check_lengths(counts, lengths)
    return Outcome(
        spans, 1, sum(map(sum, counts[1:])), settings.TIMED_STEPS * len(prompts)
    )


def length_of(row: list[int], eos: int | None) -> int:
    """Tokens up to the stop token, that one included."""
    return row.index(eos) + 1 if eos in row else len(row)


PIECES = {
    "sft": sft,
    "reward": reward,
    "dpo": dpo,
    "lora-sft": functools.partial(sft, piece="lora-sft"),
    "lora-dpo": functools.partial(dpo, piece="lora-dpo"),
    "sample": sample,
    "early": early,
    "grpo": grpo,
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["ppo"]:
        print("not in TRL 1.16: it has removed its PPO", file=sys.stderr)
        sys.exit(3)
    torch.set_num_threads(settings.THREADS)
    sys.exit(measure.main(PIECES, "trl", "torch", "transformers"))

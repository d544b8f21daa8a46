"""Tunix's share, through its trainers and sampler, as its documentation shows them."""

import inspect
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # it installs the TPU's library

import jax
import numpy as np
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3.model import Llama3
from tunix.sft import peft_trainer, utils as sft_utils
from tunix.sft.dpo import dpo_trainer
from tunix.sft.hooks import TrainingHooks

from benchmarks import assets, measure, settings, tunix_model, tunix_online
from benchmarks.measure import Outcome


class NumberTokenizer:
    """The sampler takes text only: ids written as numbers."""

    def encode(self, text: str, **_) -> list[int]:
        """The numbers in a text."""
        return [int(word) for word in text.split()]

    def decode(self, ids, **_) -> str:
        """Numbers with spaces between them."""
        return " ".join(map(str, ids))

    def bos_id(self):
        """There is none."""

    def eos_id(self) -> int:
        """As in the shared tokenizer."""
        return 1

    def pad_id(self) -> int:
        """As in the shared tokenizer."""
        return 0


class Laps(TrainingHooks):
    """Notes when the loss of each step was there."""

    def __init__(self):
        self.ends, self.losses = [], []

    def on_train_start(self, train_ctx):
        """The clock starts."""
        self.ends.append(measure.now())

    def on_train_step_end(self, train_ctx, train_step, train_loss):
        """Called when a step's loss has been fetched, the next step being queued."""
        self.ends.append(measure.now())
        self.losses.append(float(train_loss))

    def on_train_end(self, train_ctx):
        """Nothing to note."""

    def on_train_step_start(self, train_ctx):
        """Nothing to note."""

    def on_eval_step_start(self, train_ctx):
        """There is no evaluation."""

    def on_eval_step_end(self, train_ctx, eval_loss):
        """There is no evaluation."""


def sft(model: str) -> Outcome:
    """PeftTrainer on all weights, with the masks of its own command line."""
    rows = np.array(assets.read_rows(model)["sft"], np.int32)
    trainer = peft_trainer.PeftTrainer(
        tunix_model.load(model, "model"),
        tunix_model.optimizer("sft"),
        peft_trainer.TrainingConfig(**tunix_model.options()),
    )

    def model_input(x):
        mask = x.input_tokens != 0
        return {
            "input_tokens": x.input_tokens,
            "input_mask": x.input_mask,
            "positions": sft_utils.build_positions_from_mask(mask),
            "attention_mask": sft_utils.make_causal_attn_mask(mask),
        }

    def batches():
        for part in np.split(rows, settings.WARM_STEPS):
            yield peft_trainer.TrainingInput(part, np.ones_like(part))

    trainer = trainer.with_gen_model_input_fn(model_input)
    tokens = settings.TIMED_STEPS * settings.ROWS * settings.LENGTH
    return train(trainer, [*batches()] * 2, tokens)


def dpo(model: str) -> Outcome:
    """The reference's log-probabilities in every step.

    Prompts are padded on the left and replies on the right, each to one length.
    """
    rows = assets.read_rows(model)["pairs"]
    lengths = [
        max(len(row[f"{part}_ids"]) for row in rows for part in parts)
        for parts in (["prompt"], ["chosen", "rejected"])
    ]
    trainer = dpo_trainer.DPOTrainer(
        tunix_model.load(model, "model"),
        tunix_model.load(model, "model"),
        tunix_model.optimizer("dpo"),
        dpo_trainer.DPOTrainingConfig(beta=settings.BETA, **tunix_model.options()),
    )
    starts = range(0, len(rows), settings.ROWS)
    parts = [pairs(rows[i : i + settings.ROWS], *lengths) for i in starts]
    return train(trainer, parts * 2, measure.pair_tokens(rows))


def pairs(rows, prompt_length: int, reply_length: int) -> dpo_trainer.TrainingInput:
    """A batch in the trainer's own format."""
    fields = {}
    for part in ("prompt", "chosen", "rejected"):
        length = prompt_length if part == "prompt" else reply_length
        ids = np.zeros((len(rows), length), np.int32)
        mask = np.zeros_like(ids)
        for number, row in enumerate(rows):
            found = row[f"{part}_ids"]
            start = length - len(found) if part == "prompt" else 0
            ids[number, start : start + len(found)] = found
            mask[number, start : start + len(found)] = 1
        fields |= {f"{part}_ids": ids, f"{part}_mask": mask}
    return dpo_trainer.TrainingInput(**fields)


def train(trainer, batches, tokens: int) -> Outcome:
    """Trains with the clock on."""
    laps = Laps()
    trainer.with_training_hooks(laps)
    with jax.set_mesh(tunix_model.make_mesh()):
        trainer.train(batches)
    return measure.trained(laps.ends, laps.losses, tokens)


def sample(model: str) -> Outcome:
    """No stop token: every row runs to the limit."""
    prompts = assets.read_rows(model)["prompts"][: settings.FIXED_ROWS]
    return sampling(model, tunix_model.load(model, "model"), prompts, None, None)


def early(model: str) -> Outcome:
    """Rows of known, different lengths."""
    rows = assets.read_rows(model)
    transformer = tunix_model.load(model, "chain", tied=False)
    return sampling(
        model, transformer, rows["early_prompts"], rows["eos"], rows["early_lengths"]
    )


def sampling(model: str, transformer, prompts, eos, lengths) -> Outcome:
    """Its own sampler, the one that does not need vLLM or SGLang."""
    shape = settings.MODELS[model]
    size = settings.PROMPT_LENGTH + settings.NEW_TOKENS
    sampler = Sampler(
        transformer,
        NumberTokenizer(),
        CacheConfig(size, shape.num_layers, shape.num_kv_heads, shape.head_dim),
    )
    texts = [" ".join(map(str, prompt)) for prompt in prompts]
    # An id outside of the vocabulary is never sampled.
    stops = [shape.vocab_size if eos is None else eos]

    def calls():
        for number in range(1 + settings.TIMED_STEPS):
            out = sampler(
                texts,
                max_generation_steps=settings.NEW_TOKENS,
                max_prompt_length=settings.PROMPT_LENGTH,
                eos_tokens=stops,
                temperature=1.0,
                top_p=1.0,
                seed=number,
            )
            yield [len(tokens) for tokens in out.tokens]

    spans, counts = measure.laps(calls())
    if eos is not None:  # it leaves the stop token out
        limit = settings.NEW_TOKENS
        counts = [[min(n + 1, limit) for n in found] for found in counts]
    measure.check_lengths(counts, lengths)
    return Outcome(
        spans, 1, sum(map(sum, counts[1:])), settings.TIMED_STEPS * len(prompts)
    )


PIECES = {
    "sft": sft,
    "dpo": dpo,
    "sample": sample,
    "early": early,
    "grpo": tunix_online.grpo,
    "ppo": tunix_online.ppo,
}

if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "reward":
        print("not in Tunix: it has no reward-model trainer", file=sys.stderr)
        sys.exit(3)
    taken = inspect.signature(Llama3.__call__).parameters
    if sys.argv[1:2] == ["ppo"] and "segment_ids" not in taken:
        print(
            "fails in this Tunix: its PPO gives the critic segment_ids, which its "
            "Llama3 does not take",
            file=sys.stderr,
        )
        sys.exit(3)
    sys.exit(measure.main(PIECES, "google-tunix", "jax", "flax"))

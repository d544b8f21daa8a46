"""What is compared: the models, the pieces of work, and the settings that all share."""

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "bench"

WARM_STEPS = 5  # their losses are compared; compilation falls into them
TIMED_STEPS = 5  # the same rows again
COLD_STEPS = 20  # of a run that is timed from its start
THREADS = 2  # cores that every worker is held to

ROWS = 8  # rows (pairs) of a step
LENGTH = 512  # tokens of an SFT row; no pair is longer
LEARNING_RATE = {"sft": 1e-4, "reward": 1e-4, "dpo": 1e-5, "grpo": 1e-5, "ppo": 1e-5}
LEARNING_RATE |= {"lora-sft": 1e-3, "lora-dpo": 1e-4}
LORA = {"rank": 16, "alpha": 32.0}  # on all linear layers
BETA = 0.1  # of DPO
MAX_GRAD_NORM = 1.0  # the default of all frameworks compared here

PROMPT_LENGTH = 32
FIXED_ROWS, NEW_TOKENS = 16, 128
EARLY_ROWS, EARLY_MEAN = 64, 32  # of at most NEW_TOKENS

# GRPO: ONLINE_PROMPTS x GROUP_SIZE completions; PPO: as many prompts, one of each.
ONLINE_PROMPTS, GROUP_SIZE, ONLINE_NEW_TOKENS = 8, 8, 64
QUESTIONS = ONLINE_PROMPTS * GROUP_SIZE
ONLINE_WARM, ONLINE_TIMED = 2, 3
KL_COEF = 0.04  # above 0, so that every framework runs its reference

EOS, PAD = "<eos>", "<pad>"


class Shape(NamedTuple):
    """A LLaMA with tied embeddings: V, D, F, L, N, K of the house; H = D / N."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int

    @property
    def head_dim(self) -> int:
        """H."""
        return self.hidden_size // self.num_heads


MODELS = {
    "7m": Shape(8192, 256, 704, 6, 8, 4),
    "40m": Shape(32000, 512, 1408, 8, 8, 4),
}
PIECES = {
    "sft": f"SFT step, {ROWS} rows of {LENGTH} tokens",
    "reward": f"reward-model step, {ROWS} pairs of at most {LENGTH} tokens",
    "dpo": f"DPO step with its reference pass, {ROWS} pairs of at most {LENGTH}",
    "lora-sft": f"SFT step of adapters, {ROWS} rows of {LENGTH} tokens",
    "lora-dpo": f"DPO step of adapters, {ROWS} pairs of at most {LENGTH}",
    "sample": f"sampling, {FIXED_ROWS} rows of {NEW_TOKENS} new tokens",
    "early": f"sampling, {EARLY_ROWS} rows that stop after {EARLY_MEAN} on average",
    "grpo": f"GRPO iteration, {ONLINE_PROMPTS} prompts x {GROUP_SIZE} completions",
    "ppo": f"PPO iteration, {ONLINE_PROMPTS * GROUP_SIZE} completions",
}
# Pieces whose first losses every framework must agree on: same rows, same mathematics.
COMPARED = ("sft", "reward", "dpo")
# Timed from the start of the command, too, and the frameworks that have them.
COLD = COMPARED
COLD_FRAMEWORKS = ("jalign", "trl")
PEERS = ("trl", "tunix")

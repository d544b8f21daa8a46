"""A tiny PPO run in memory and on disk, for the tests of the online loop."""

import json
from pathlib import Path

import jax
import numpy as np

from jalign import data, models
from jalign.train.online_config import CriticConfig, PPOConfig, PPOOptions, SampleConfig
from jalign.train.online_models import OnlineModels, reference_params
from jalign.train.optim import OptimConfig
from jalign.train.trained import Trained

WORDS = ["<pad>", "<s>", "</s>", *"abcdefghijklm"]
STOP = WORDS.index("</s>")
CONFIG = models.ModelConfig(
    vocab_size=len(WORDS),
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    bos_token_id=1,
    eos_token_ids=(STOP,),
    pad_token_id=0,
)


def share_of_a(prompts, completions, rows):
    """The rewarded behaviour: say `a`."""
    del prompts, rows
    return [text.split().count("a") / 8 for text in completions]


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def make_config(out="out", *, sampling=None, **changes) -> PPOConfig:
    ppo = {
        "num_epochs": 2,
        "num_minibatches": 2,
        "critic": CriticConfig(critic_learning_rate=3e-3),
        "sampling": SampleConfig(max_new_tokens=8, **(sampling or {})),
    } | changes.pop("ppo", {})
    fields = {
        "model": "model",
        "data": "prompts.jsonl",
        "reward": "reward.py:share_of_a",
        "steps": 3,
        "batch_size": 16,
        "max_length": 16,
        "mesh": "fsdp=1",
        "optim": OptimConfig(learning_rate=3e-3, schedule="constant"),
    } | changes
    return PPOConfig(out=str(out), ppo=PPOOptions(**ppo), **fields)


SHARED = {"critic": CriticConfig(shared_trunk=True)}


def make_models(reward=share_of_a, mesh=None, *, shared=False) -> OnlineModels:
    policy = models.Model(CONFIG, mesh=mesh)
    params = policy.init(jax.random.key(0))
    key = jax.random.key(1)
    if shared:
        found = {"policy": models.add_value_head(policy, params, key=key)}
    else:
        critic = models.add_scalar_head(policy, params, key=key)
        found = {"policy": (policy, params), "critic": critic}

    def float_reward(*args):
        return np.asarray(reward(*args), np.float32)

    return OnlineModels(
        {name: model for name, (model, _) in found.items()},
        {name: params for name, (_, params) in found.items()},
        {name: Trained(params) for name, (_, params) in found.items()},
        make_tokenizer(),
        float_reward,
        reference=reference_params(policy, params),
    )


def make_prompts(count=24) -> list[data.PromptExample]:
    random = np.random.default_rng(0)
    prompts = []
    for _ in range(count):
        ids = random.integers(3, len(WORDS), random.integers(2, 6)).astype(np.int32)
        text = " ".join(WORDS[i] for i in ids)
        prompts.append(data.PromptExample(ids, text, {"prompt": text}))
    return prompts


def write_world(folder: Path) -> dict[str, str]:
    """A policy, prompts and a reward file on disk: the config's fields."""
    made = make_models()
    policy = made.models["policy"], made.params["policy"]
    models.save(folder / "model", *policy, made.tokenizer)
    lines = [json.dumps({"prompt": p.text}) + "\n" for p in make_prompts()]
    (folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "held_out.jsonl").write_text("".join(lines[:10]), encoding="utf-8")
    (folder / "reward.py").write_text(
        "import jax\n"
        "def share_of_a(prompts, completions, rows):\n"
        "    assert jax.process_index() == 0, 'process 0 alone is asked'\n"
        "    return [text.split().count('a') / 8 for text in completions]\n"
        "def words(prompts, completions, rows):\n"
        "    return [len(text.split()) for text in completions]\n"
        "def tokens(completions, prompts, completion_ids, **kwargs):\n"  # TRL's form
        "    assert jax.process_index() == 0, 'process 0 alone is asked'\n"
        "    return [len(ids) for ids in completion_ids]\n",
        encoding="utf-8",
    )
    return {
        "model": str(folder / "model"),
        "data": str(folder / "prompts.jsonl"),
        "eval_data": str(folder / "held_out.jsonl"),
        "reward": f"{folder / 'reward.py'}:share_of_a",
    }

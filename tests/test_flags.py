"""The flags of every command, their defaults, and that each is read somewhere."""

import ast
import dataclasses
import importlib
from pathlib import Path

import pytest

from jalign import cli

PACKAGE = Path(cli.__file__).parent

ROWS = "split=None eval_data=None eval_split=None columns=None bad_rows=error "
RUN = """model=! data=! out=! steps=None epochs=1.0 seed=0 mesh=None resume=True
learning_rate=1e-05 schedule=linear warmup_steps=0 end_fraction=0.0 optimizer=adamw
reschedule=False weight_decay=0.0 b1=0.9 b2=0.999 eps=1e-08 max_grad_norm=1.0
microbatches=1 dtype=float32 remat=False router_aux_coef=0.0
eval_every=None keep_best=None patience=None base=None
lora_rank=None lora_alpha=32.0 lora_targets=all lora_dropout=0.0 lora_train=None
lora_rank_pattern=None lora_alpha_pattern=None rslora=False quantize=None """
OFFLINE = ROWS + RUN + "batch_size=8 max_length=1024 checkpoint_every=100 "
ONLINE = """reward=! batch_size=64 max_length=512 checkpoint_every=10 num_minibatches=1
entropy_coef=0.0 max_new_tokens=64 temperature=1.0 top_k=0 top_p=1.0 stop_token_ids=()
reward_clip=None missing_eos_penalty=None reward_timeout=600.0
eval_reward=None stop_kl=None """
ONLINE = ROWS + RUN + ONLINE
PLAN = " topology=None compile=False find=None allow= json=None html=None"
# "!" is a flag that must be given.
FLAGS = {
    "demo": """out=runs/demo seed=0 sft_steps=144 reward_steps=340 ppo_steps=56
        dpo_steps=160 eval_prompts=256""",
    "sft": f"""{OFFLINE} packing=False assistant_only=None completion_only=None
        loss=sft label_smoothing=0.0 z_loss=0.0""",
    "reward": f"{OFFLINE} loss=bradley_terry center_coef=0.0",
    "dpo": f"{OFFLINE} loss=dpo beta=None label_smoothing=0.0",
    "ppo": f"""{ONLINE} num_epochs=4 clip_eps=0.2 gamma=1.0 gae_lambda=0.95
        whiten_advantages=True shared_trunk=False value_coef=None value_clip_eps=0.2
        critic_learning_rate=None save_critic=False kl_coef=0.05 kl_target=None
        kl_horizon=10000 whiten_rewards=False""",
    "grpo": f"""{ONLINE} num_epochs=1 group_size=8 loss=dapo clip_eps=None
        clip_eps_high=None beta=0.0 scale_rewards=auto mask_truncated=False""",
    "generate": """model=! base=None prompt=() prompts=None split=None columns=None
        bad_rows=error max_new_tokens=128 temperature=1.0 top_k=0 top_p=1.0 chat=False
        batch_size=64 seed=0 mesh=None dtype=float32 out=None""",
    "eval": """model=! data=! base=None split=None columns=None task=auto
        ref_model=None reward=None reward_timeout=600.0 limit=None batch_size=16
        max_length=1024 max_new_tokens=128 temperature=1.0 seed=0 mesh=None
        bad_rows=error out=None""",
    "merge": """out=! model=None adapter=None delta=None models=() method=None base=None
        weights=() density=None scale=None t=None seed=None dtype=None""",
}
LAUNCH = """coordinator=None num_processes=None process_id=None heartbeat_timeout=60
watchdog_timeout=None auto_remat=True cpu_devices=None
compilation_cache=True traceback=False"""


def flags_of(config_class) -> dict[str, str]:
    """Flat name -> default as text; a name that is there twice raises."""
    found: dict[str, str] = {}
    for field in dataclasses.fields(config_class):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(default):
            more = flags_of(type(default))
        else:
            required = default is dataclasses.MISSING
            more = {field.name: "!" if required else str(default)}
        assert not more.keys() & found.keys()
        found |= more
    return found


def config_of(command):
    module, name, *_ = cli.COMMANDS[command]
    return getattr(importlib.import_module(module), name)


def table(text: str) -> dict[str, str]:
    return dict(entry.split("=", 1) for entry in text.split())


@pytest.mark.parametrize("command", FLAGS)
def test_flags_and_their_defaults(command):
    assert flags_of(config_of(command)) == table(FLAGS[command])


@pytest.mark.parametrize("recipe", cli.RECIPES)
def test_flags_of_a_plan_are_the_runs_without_what_is_not_read(recipe):
    given = table(FLAGS[recipe] + PLAN) | {"data": "", "out": ""}
    if given.get("reward"):
        given["reward"] = "REWARD_MODEL"
    assert flags_of(config_of(f"plan {recipe}")) == given


def test_every_command_is_pinned():
    assert cli.COMMANDS.keys() == FLAGS.keys() | {f"plan {r}" for r in cli.RECIPES}


def test_flags_of_the_launch():
    assert flags_of(cli.Launch) == table(LAUNCH)


def reads(tree: ast.AST):
    """Names read as attributes (`config.NAME`), the checks of a config left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr
        # `getattr(config, name) for name in ("batch_size", ...)`
        if isinstance(node, ast.Tuple):
            yield from (e.value for e in node.elts if isinstance(e, ast.Constant))
        yield from reads(node)


def test_every_flag_is_read_somewhere():
    read = set()
    for file in PACKAGE.rglob("*.py"):
        read |= set(reads(ast.parse(file.read_text(encoding="utf-8"))))
    read.add("traceback")  # looked for among the words, as parsing them may fail
    every = set(flags_of(cli.Launch))
    every |= set().union(*(flags_of(config_of(command)) for command in cli.COMMANDS))
    assert every <= read, every - read

"""The `jalign` command: the only file that reads argv and env or sets jax config.

Flags come from the config dataclasses (cli_options.py), and from a `--config
FILE.yaml`, whose entries stand before the user's own flags, so that these win.
"""

import contextlib
import dataclasses
import importlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jalign.settings import Checked, flags_of, nearest, number

# command -> (module, config class, function taking the config, what it does)
COMMANDS = {
    "demo": ("jalign.demo", "DemoConfig", "run_demo", "the whole pipeline, 5 minutes"),
    "sft": ("jalign.train", "SFTConfig", "run_sft", "supervised fine-tuning"),
    "reward": ("jalign.train", "RewardConfig", "run_reward", "Bradley-Terry reward"),
    "dpo": ("jalign.train", "DPOConfig", "run_dpo", "direct preference optimization"),
    "ppo": ("jalign.train", "PPOConfig", "run_ppo", "proximal policy optimization"),
    "grpo": ("jalign.train", "GRPOConfig", "run_grpo", "groups in place of a critic"),
    "generate": ("jalign.commands", "GenerateConfig", "run_generate", "sample text"),
    "eval": ("jalign.commands", "EvalConfig", "run_eval", "held-out measures"),
    "merge": ("jalign.merge", "MergeConfig", "run_merge", "adapters, averages, deltas"),
}
RECIPES = [name for name, row in COMMANDS.items() if row[0] == "jalign.train"]
for _name in RECIPES:
    _plan = COMMANDS[_name][1].replace("Config", "Plan")
    COMMANDS[f"plan {_name}"] = ("jalign.plan", _plan, "run_plan", "")
PLAN_USAGE = (
    f"usage: jalign plan {{{','.join(RECIPES)}}} [OPTIONS]\n\n"
    "Will it fit, and how fast, before you launch? As in\n"
    "`jalign plan sft --model MODEL`: options of that run, of which --model alone\n"
    "has to be given, and --topology, --compile, --find and others of the plan's own."
)
RESUMABLE = ("demo", "sft", "reward", "dpo", "ppo", "grpo")
EXIT_OK, EXIT_BUG, EXIT_USER, EXIT_PREEMPTED = 0, 1, 2, 75
EXIT_PIPE = 128 + 13  # as a shell reports SIGPIPE


@dataclasses.dataclass(frozen=True)
class Launch(Checked):
    """Hosts and devices. On a TPU slice, SLURM or Open MPI nothing has to be said."""

    coordinator: str | None = None
    """HOST:PORT of process 0, where the processes find each other."""
    num_processes: int | None = None
    """Number of processes of the job."""
    process_id: int | None = None
    """Which of them this one is, from 0."""
    heartbeat_timeout: int = number(60, ">= 1")
    """Seconds after which a process that has died, or was stopped, ends the others."""
    watchdog_timeout: float | None = number(None, ">= 0")
    """A process that is stuck ends itself (exit code 76, with its stacks) after so many
    seconds without a step, a batch or another sign of life; loading and compiling do
    not count. 0 never does; unset is 1800 with several processes, and 0 in one."""
    auto_remat: bool = True
    """Recompute activations (--remat) where an accelerator's memory is too small for
    the run without, as `jalign plan` has it."""
    cpu_devices: int | None = None
    """Run on this many virtual CPU devices: to try a mesh without an accelerator."""
    compilation_cache: bool = True
    """Keep compiled programs on disk, for a quick second start."""
    traceback: bool = False
    """Show the Python traceback of an error in the input, too."""


def main(argv: list[str] | None = None, **given: Any) -> int:
    """Runs one command; returns the exit code (0 only on success).

    Args:
      argv: its words; None takes those of the process.
      **given: `callbacks` of a training command, for a program that looks on.
    """
    try:
        code = command(argv, **given)
        if code and (sharding := sys.modules.get("jalign.sharding")):
            sharding.leave(code)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # as `jalign ... | head` leaves it
        # Else Python, which flushes once more at its end, would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE


def command(argv: list[str] | None, **given: Any) -> int:
    """As `main`; where standard output is closed, BrokenPipeError goes through."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in {"-h", "--help"}:
        print(usage())
        return EXIT_OK if args else EXIT_USER
    if args[0] == "--version":
        print(f"jalign {importlib.import_module('jalign').__version__}")
        return EXIT_OK
    name, *rest = args
    if name == "plan":
        if not rest or rest[0] in {"-h", "--help"}:
            print(PLAN_USAGE)
            return EXIT_OK if rest else EXIT_USER
        if rest[0] not in RECIPES:
            near = nearest(rest[0], RECIPES)
            return fail(f"plan which run? {rest[0]!r} is none{near}\n\n{PLAN_USAGE}")
        name = f"plan {rest.pop(0)}"
    if name not in COMMANDS:
        return fail(f"unknown command {name!r}{nearest(name, COMMANDS)}\n\n{usage()}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Its advice (install torch, install TensorFlow) is not for users of jalign.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    resumable = name in RESUMABLE
    try:
        with until_a_run_is_open() if resumable else contextlib.nullcontext():
            return run(name, rest, **given)
    except SystemExit as stop:  # tyro: 0 for --help, 2 for a wrong flag
        return stop.code if isinstance(stop.code, int) else EXIT_USER
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        return fail("interrupted", code=EXIT_PREEMPTED if resumable else 130)
    except BaseException as error:
        if type(error).__name__ == "Preempted":
            return fail(str(error), code=EXIT_PREEMPTED)
        if not isinstance(error, Exception):
            raise
        if not is_user_error(error):
            traceback.print_exc()
            return EXIT_BUG
        if "--traceback" in rest:
            traceback.print_exc()
        return fail(f"jalign {name}: {describe(error)}")


@contextlib.contextmanager
def until_a_run_is_open() -> Iterator[None]:
    """SIGTERM ends a command that can be started again with 75 from its first moment,
    while it imports and between the runs of a demo; an open run has its own handler."""

    def leave(number: int, _frame: Any) -> None:
        text = f"stopped by {signal.Signals(number).name}; the same command goes on"
        raise SystemExit(fail(text, code=EXIT_PREEMPTED))

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def usage() -> str:
    """The overview that `jalign --help` prints."""
    words = {name: row[3] for name, row in COMMANDS.items() if row[3]}
    words["plan"] = "will a run fit, before you launch: jalign plan sft --model MODEL"
    rows = "\n".join(f"  {name:<10} {text}" for name, text in words.items())
    return (
        "usage: jalign COMMAND [--config FILE.yaml] [OPTIONS]\n\n"
        f"{rows}\n\n`jalign COMMAND --help` lists its options."
    )


def run(name: str, args: list[str], **given: Any) -> int:
    """Sets up jax for a command and calls its function, with what is given beside its
    config."""
    config, launch = read(name, args)
    start_jax(launch)
    from jalign.sharding import is_main_process, watched

    module_name, _, function_name, _ = COMMANDS[name]
    function = getattr(importlib.import_module(module_name), function_name)
    with watched(launch.watchdog_timeout):
        if launch.auto_remat and name.removeprefix("plan ") in RECIPES:
            config = importlib.import_module("jalign.plan").recomputed(config)
        result = function(config, **given)
    if result is not None and is_main_process():
        print(result if isinstance(result, str) else summary_lines(result))
    return EXIT_OK


def read(name: str, args: list[str]) -> tuple[Any, Launch]:
    """A command's config and Launch, of its flags and YAML files.

    Raises: SystemExit after --help or a message about wrong flags; ValueError.
    """
    from jalign.cli_options import EXAMPLES, example, parse
    from jalign.cli_yaml import expand_yaml

    module_name, config_name, *_ = COMMANDS[name]
    config_class = getattr(importlib.import_module(module_name), config_name)
    known = flags_of(config_class).keys() | flags_of(Launch).keys()
    args = expand_yaml(args, known)
    try:
        return parse(name, args, config_class, Launch)
    except SystemExit as stop:
        if not stop.code and name.split()[0] in EXAMPLES:  # after --help
            print(f"\nexample: {example(name)}")
        raise


def start_jax(launch: Launch) -> None:
    """Settings of jax and of memory, then the multi-host start, before any array."""
    import jax

    from jalign import sharding

    if launch.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", launch.cpu_devices)
        # Each collective that waits holds a thread; a device may have several at once,
        # and by default there are as many threads as devices: they would wait forever.
        threads = max(os.cpu_count() or 1, 4 * launch.cpu_devices)
        os.environ.setdefault("PJRT_NPROC", str(threads))
    # One that the user has named (JAX_COMPILATION_CACHE_DIR) stays.
    if launch.compilation_cache and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", f"{home}/jalign/xla")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    sharding.give_back_compiler_memory()
    hosts = launch.coordinator, launch.num_processes, launch.process_id
    sharding.initialize(*hosts, heartbeat_timeout=launch.heartbeat_timeout)
    setup_logging(quiet=not sharding.is_main_process())


class _RedWarnings(logging.Formatter):
    """Messages as they are; on a terminal what is wrong is red."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        red = record.levelno >= logging.WARNING and sys.stderr.isatty()
        return f"\x1b[31m{text}\x1b[0m" if red else text


def setup_logging(quiet: bool) -> None:
    """One line a message on stderr; processes other than 0 only warn."""
    handler = logging.StreamHandler()
    handler.setFormatter(_RedWarnings("%(message)s"))
    logging.basicConfig(handlers=[handler], force=True)
    logging.getLogger("jalign").setLevel(logging.WARNING if quiet else logging.INFO)
    # It logs what it raises, with a traceback, and the message is said here.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def is_user_error(error: Exception) -> bool:
    """True where the message was written for the user: an error about a file or memory,
    or one that jalign itself raised. An error from inside a library is a bug and is
    shown with its traceback."""
    if isinstance(error, OSError | MemoryError):
        return True
    # NaN logits while sampling are FloatingPointErrors.
    if not isinstance(error, ValueError | FloatingPointError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    here = str(Path(__file__).resolve().parent)
    return bool(frames) and str(Path(frames[-1].filename).resolve()).startswith(here)


def describe(error: Exception) -> str:
    """The message of a user error on its own."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or error}"
    return str(error) or "not enough memory"


def summary_lines(summary: dict[str, Any]) -> str:
    """A flat result as aligned `name value` lines."""
    width = max((len(k) for k in summary), default=0)
    rows = ((k, f"{v:.4g}" if isinstance(v, float) else v) for k, v in summary.items())
    return "\n".join(f"{k:<{width}}  {v}" for k, v in rows)


def fail(message: str, code: int = EXIT_USER) -> int:
    """Prints an error for a person and returns the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())

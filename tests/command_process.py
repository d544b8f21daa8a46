"""Commands in a process of their own, one after another, and a signal in the midst.

    python -m tests.command_process JSON [SIGNAL STEP]

The process sends itself the signal while it writes the metrics of the step: a real
death, at the same moment on a slow machine as on a fast one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 300


def start(*commands: list[str], signal: tuple[int, int] | None = None):
    """The Popen of `jalign` with each of the words; signal: its number and the step."""
    words = [sys.executable, "-m", "tests.command_process", json.dumps(commands)]
    return subprocess.Popen(
        [*words, *map(str, signal or ())],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"},
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """What it has said, once it has ended with this code."""
    try:
        text, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == code, text
    return text


def signal_at(number: int, step: int) -> None:
    from jalign.train.metrics import MetricsWriter

    real = MetricsWriter.log

    def log(self, now, metrics):
        row = real(self, now, metrics)
        if now == step:
            os.kill(os.getpid(), number)
        return row

    MetricsWriter.log = log


def main() -> int:
    from jalign import cli

    commands, *signal = (json.loads(word) for word in sys.argv[1:])
    if signal:
        signal_at(*signal)
    return max(cli.main(words) for words in commands)


if __name__ == "__main__":
    sys.exit(main())

"""Kills, and stops, one of two training processes, and times the end of the other.

    python scripts/launch_faults.py [-v] [NUMBERS OF CASES]

A dead or stopped peer has to end the other within --heartbeat-timeout + 2 s, a stopped
one within --watchdog-timeout + 10 %, whichever is shorter; and what is stopped has to
end once it is woken up. Two virtual CPU devices a process; about two minutes.
"""

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.command_process import start
from tests.sharding.processes import free_port
from tests.train import world

CASES = [  # signal, to which process, heartbeat, watchdog, seconds that the other has
    ("SIGKILL", 1, 5, 0, 7.0),
    ("SIGKILL", 0, 5, 0, 7.0),
    ("SIGSTOP", 1, 5, 0, 7.0),
    ("SIGSTOP", 0, 5, 0, 7.0),
    ("SIGSTOP", 1, 60, 6, 6.6),
    ("SIGSTOP", 0, 60, 6, 6.6),
]


def two(here: Path, out: Path, heartbeat: int, watchdog: int) -> list:
    """The two processes, which have taken a few steps of many."""
    hosts = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2")
    flags = ("--mesh", "", "--cpu-devices", "2", "--steps", "1000000", *hosts)
    flags += ("--heartbeat-timeout", str(heartbeat), "--checkpoint-every", "0")
    flags += ("--watchdog-timeout", str(watchdog))
    both = [
        start(world.words("sft", here, out, *flags, "--process-id", str(index)))
        for index in range(2)
    ]
    metrics = out / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 5:
        if any(process.poll() is not None for process in both):
            for process in both:
                process.kill()
            raise RuntimeError("\n---\n".join(p.communicate()[0] for p in both))
        time.sleep(0.1)
    return both


def seconds_to_end(process, most: float = 180.0) -> float:
    began = time.monotonic()
    process.wait(timeout=most)
    return time.monotonic() - began


def main() -> int:
    late = 0
    with tempfile.TemporaryDirectory() as folder:
        here = world.make(Path(folder))
        wanted = {int(word) for word in sys.argv[1:] if word.isdecimal()}
        for number, (name, victim, heartbeat, watchdog, most) in enumerate(CASES):
            if wanted and number not in wanted:
                continue
            both = two(here, here / str(number), heartbeat, watchdog)
            hit, other = both[victim], both[1 - victim]
            try:
                hit.send_signal(signal.Signals[name])
                seconds = seconds_to_end(other)
                woken = ""
                if name == "SIGSTOP":
                    hit.send_signal(signal.SIGCONT)
                    woken = f"; woken up it ends in {seconds_to_end(hit):.1f} s"
                    woken += f" with {hit.returncode}"
            finally:
                for process in both:
                    process.kill()
            late += seconds > most
            print(
                f"{name} of process {victim}, heartbeat {heartbeat} s, watchdog "
                f"{watchdog} s: the other ends in {seconds:.1f} s of {most} with "
                f"{other.returncode}{woken}{' LATE' if seconds > most else ''}",
                flush=True,
            )
            if "-v" in sys.argv:
                print(other.communicate()[0], hit.communicate()[0], sep="\n---\n")
    return int(late > 0)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())

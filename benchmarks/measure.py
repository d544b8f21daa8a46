"""What a worker process reports: one JSON object, as the last line of its output."""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from typing import Any, NamedTuple

from benchmarks import settings

MARK = "BENCH-RESULT "


class Outcome(NamedTuple):
    """What a piece of work measured.

    Attributes:
      seconds: of each step, the warm ones first; the first one with compilation.
      warm: how many steps are not timed.
      tokens: useful tokens of all timed steps together, padding not counted.
      examples: rows, pairs or completions of all timed steps together.
      losses: of the first steps; empty where nothing is trained.
      notes: anything else, by name.
    """

    seconds: list[float]
    warm: int
    tokens: int
    examples: int
    losses: list[float] = []
    notes: dict[str, Any] = {}


def laps(steps: Iterable[Any]) -> tuple[list[float], list[Any]]:
    """Runs the steps; (seconds of each, what each gave).

    A step's time goes from the end of the one before to its own end, so that reading
    and padding its rows counts. The steps must give host values: the wait counts too.
    """
    seconds, values, last = [], [], time.perf_counter()
    for value in steps:
        now = time.perf_counter()
        seconds.append(now - last)
        values.append(value)
        last = now
    return seconds, values


def rss_mib() -> float:
    """The largest resident memory of this process so far, MiB (Linux: ru_maxrss)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def versions(*packages: str) -> dict[str, str]:
    """The installed versions."""
    return {name: metadata.version(name) for name in packages}


def pair_tokens(pairs: Iterable[Mapping[str, Any]]) -> int:
    """Tokens of both sides, each with its prompt."""
    return sum(
        2 * len(pair["prompt_ids"])
        + len(pair["chosen_ids"])
        + len(pair["rejected_ids"])
        for pair in pairs
    )


def online(seconds: list[float], **notes: Any) -> Outcome:
    """Of iterations with rollouts in which every completion runs to the limit.

    It does but for the random model's rare stop tokens (1 of V at every place).
    """
    completions = settings.QUESTIONS * settings.ONLINE_TIMED
    tokens = completions * settings.ONLINE_NEW_TOKENS
    return Outcome(seconds, settings.ONLINE_WARM, tokens, completions, notes=notes)


def check_lengths(counts: Iterable[list[int]], lengths: list[int] | None) -> None:
    """Raises ValueError where completions are not as long as they must be.

    lengths: of the rows, or None where every row runs to the limit.
    """
    for found in counts:
        wanted = lengths or [settings.NEW_TOKENS] * len(found)
        if found != wanted:
            raise ValueError(f"completion lengths {found} are not {wanted}")


def main(pieces: Mapping[str, Callable[[str], Outcome]], *packages: str) -> int:
    """`python -m benchmarks.worker_NAME PIECE MODEL`: runs it and prints the result."""
    if len(sys.argv) != 3 or sys.argv[1] not in pieces:
        print(f"usage: {sys.argv[0]} {{{','.join(pieces)}}} MODEL", file=sys.stderr)
        return 2
    piece, model = sys.argv[1:]
    before = rss_mib()
    outcome = pieces[piece](model)
    result = outcome._asdict() | {
        "piece": piece,
        "model": model,
        "rss_imported": before,
        "rss_peak": rss_mib(),
        "versions": versions(*packages),
    }
    print(f"\n{MARK}{json.dumps(result)}", flush=True)
    return 0

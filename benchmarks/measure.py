"""What a worker process reports: one JSON object, as the last line of its output."""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

from benchmarks import settings

MARK = "BENCH-RESULT "


Moment = tuple[float, float]  # wall clock and CPU time of all threads, s


class Spans(NamedTuple):
    """How long each step took, the warm ones first; the first one with compilation.

    Attributes:
      seconds: by the clock on the wall.
      cpu: CPU time of all threads together, which other processes disturb less.
    """

    seconds: list[float]
    cpu: list[float]


class Outcome(NamedTuple):
    """What a piece of work measured.

    Attributes:
      spans: of all steps.
      warm: how many steps are not timed.
      tokens: useful tokens of all timed steps together, padding not counted.
      examples: rows, pairs or completions of all timed steps together.
      losses: of the first steps; empty where nothing is trained.
      notes: anything else, by name.
    """

    spans: Spans
    warm: int
    tokens: int
    examples: int
    losses: list[float] = []
    notes: dict[str, Any] = {}


def now() -> Moment:
    """This moment, for `spans`."""
    return time.perf_counter(), time.process_time()


def spans(moments: Sequence[Moment]) -> Spans:
    """From each moment to the next."""
    pairs = list(zip(moments, moments[1:], strict=False))
    return Spans([b[0] - a[0] for a, b in pairs], [b[1] - a[1] for a, b in pairs])


def laps(steps: Iterable[Any]) -> tuple[Spans, list[Any]]:
    """Runs the steps; (how long each took, what each gave).

    A step's time goes from the end of the one before to its own end, so that reading
    and padding its rows counts. The steps must give host values: the wait counts too.
    """
    moments, values = [now()], []
    for value in steps:
        moments.append(now())
        values.append(value)
    return spans(moments), values


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


def trained(moments: Sequence[Moment], losses: Sequence[float], tokens: int) -> Outcome:
    """Of a trainer's steps, by the moments at which they ended."""
    examples = settings.TIMED_STEPS * settings.ROWS
    return Outcome(
        spans(moments), settings.WARM_STEPS, tokens, examples, list(losses[:5])
    )


def online(spans: Spans, **notes: Any) -> Outcome:
    """Of iterations with rollouts in which every completion runs to the limit.

    It does but for the random model's rare stop tokens (1 of V at every place).
    """
    completions = settings.QUESTIONS * settings.ONLINE_TIMED
    tokens = completions * settings.ONLINE_NEW_TOKENS
    return Outcome(spans, settings.ONLINE_WARM, tokens, completions, notes=notes)


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
    result = outcome._asdict()
    result |= result.pop("spans")._asdict()
    result |= {
        "piece": piece,
        "model": model,
        "rss_imported": before,
        "rss_peak": rss_mib(),
        "versions": versions(*packages),
    }
    print(f"\n{MARK}{json.dumps(result)}", flush=True)
    return 0

"""A plan as text, as data for JSON, and as a page."""

import dataclasses
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jalign.paths import located, write_text
from jalign.plan.recipes import RECIPES, name_of
from jalign.plan.speed import FAR_OFF, Speed
from jalign.plan.work import Part, total
from jalign.report import render
from jalign.settings import as_text
from jalign.train.online_config import OnlineConfig

GIB = 2**30


class Table(NamedTuple):
    """One account.

    Attributes:
      title, unit: heads of its columns.
      rows: (name, number in that unit, note); None in place of a number: a heading.
    """

    title: str
    unit: str
    rows: Sequence[tuple[str, float | None, str]]


def table(p: Any) -> str:
    """A Plan, at most 80 columns wide."""
    lines = [*head(p)]
    for account in accounts(p):
        lines += ["", f"{account.title:<34}{account.unit:>5}"]
        for name, number, note in account.rows:
            amount = "" if number is None else f"{number:9.3f}"
            line = f"  {name:<28}{amount}  {note}".rstrip()
            lines += [line if number is not None else f"  {name}"]
    if sentences := assumptions(p):
        lines += ["", sentences[0]]
    for sentence in sentences[1:]:
        lines += textwrap.wrap(
            sentence, 80, initial_indent="- ", subsequent_indent="  "
        )
    lines += ["", *verdict(p)]
    if p.command:
        whole = textwrap.TextWrapper(76, subsequent_indent="    ")
        whole.break_long_words = whole.break_on_hyphens = False
        lines += [" \\\n".join(whole.wrap(p.command))]
    return "\n".join(lines)


def head(p: Any) -> list[str]:
    """What is planned, in three lines."""
    c, compute = p.config, p.config.compute
    group = f"{c.group_size} x " if isinstance(c, OnlineConfig) else ""
    mesh = ", ".join(f"{name}={size}" for name, size in p.mesh.items())
    return [
        f"{name_of(c)} of {c.model}: {p.num_parameters / 1e9:.3g} B parameters",
        f"on {p.machine.num_devices} x {p.machine.kind}, mesh {mesh}",
        f"{c.batch_size} x {group}{c.max_length} tokens in {compute.microbatches} "
        f"micro-batch(es), {compute.dtype}, {'remat' if compute.remat else 'no remat'}"
        f", {c.optim.optimizer}",
    ]


def accounts(p: Any) -> Iterator[Table]:
    """Memory, arithmetic, traffic and time of one device."""
    update = "an update" if isinstance(p.config, OnlineConfig) else "a step"
    yield Table("on each device", "GiB", [*_memory(p)])
    if p.compiled:
        rows = [(r.name, r.bytes / GIB, r.note) for r in p.compiled]
        rows += [("peak (compiled)", sum(r.bytes for r in p.compiled) / GIB, "")]
        yield Table("the same, of the compiled step", "GiB", rows)
    if p.compiled_rollout:
        rows = [(r.name, r.bytes / GIB, r.note) for r in p.compiled_rollout]
        yield Table("beside it, of the compiled rollout", "GiB", rows)
    rows = [*_scaled(p.work.flops, 1e12)]
    rows += [(f"again: {n}", x, note) for n, x, note in _scaled(p.work.again, 1e12)]
    rows += [(f"beside: {n}", x, note) for n, x, note in _scaled(p.work.beside, 1e12)]
    yield Table(f"{update} computes", "TFLOP", rows)
    if p.work.sent:
        rows = [*_scaled(p.work.sent, 1e9), ("in all, at least", _gb(p.work.sent), "")]
        thrice = "each weight 3 x in bfloat16, frozen 2 x"
        rows += [("plain fsdp would", p.work.bound / 1e9, thrice)]
        yield Table(f"{update} sends", "GB", rows)
    if p.compiled_sent:
        rows = [*_scaled(p.compiled_sent, 1e9), ("in all", _gb(p.compiled_sent), "")]
        yield Table("the same, of the compiled step", "GB", rows)
    for speed, whose in (
        (p.speed, f"{update} takes, by arithmetic"),
        (p.compiled_speed, f"{update} takes, as compiled"),
    ):
        if speed is not None:
            yield Table(whose, "s", [*_time(speed)])
    if p.found:
        yield Table("the best of those that fit", "s", [*map(_candidate, p.found)])


def _memory(p: Any) -> Iterator[tuple[str, float | None, str]]:
    for row in p.resident:
        yield row.name, row.bytes / GIB, row.note
    for phase, rows in p.transient.items():
        yield f"during {phase}", None, ""
        for row in rows:
            if row.bytes:
                yield row.name, row.bytes / GIB, row.note
    yield "peak (estimate)", p.total / GIB, ""


def _time(speed: Speed) -> Iterator[tuple[str, float | None, str]]:
    yield from _scaled(speed.parts, 1)
    yield "in all", speed.seconds, f"MFU {speed.mfu:.1%}"
    yield from ((f"hidden: {n}", x, note) for n, x, note in _scaled(speed.hidden, 1))


def _scaled(parts: Iterable[Part], unit: float) -> Iterator[tuple[str, float, str]]:
    return ((part.name, part.amount / unit, part.note) for part in parts)


def _gb(parts: Iterable[Part]) -> float:
    return total(parts) / 1e9


def _candidate(p: Any) -> tuple[str, float | None, str]:
    mesh = ",".join(f"{name}={size}" for name, size in p.mesh.items() if size > 1)
    compute, seconds = p.config.compute, p.speed.seconds if p.speed else 0.0
    words = [f"{p.peak / GIB:.1f} GiB", *["remat"] * compute.remat]
    words += (
        [f"{compute.microbatches} micro-batches"] if compute.microbatches > 1 else []
    )
    words += ["float32"] if compute.dtype == "float32" else []
    words += ["adafactor"] if p.config.optim.optimizer == "adafactor" else []
    return mesh or "one device", seconds, ", ".join(words)


def verdict(p: Any) -> list[str]:
    """Whether it fits, and what else would."""
    said = {True: "fits", False: "does NOT fit", None: "capacity unknown"}[p.fits]
    size = p.machine.device_bytes
    room = f" in {size / GIB:.0f} GiB ({p.usable / size:.0%} usable)" if size else ""
    return [said + room, *filter(None, [p.advice])]


def assumptions(p: Any) -> list[str]:
    """What the times rest on, in sentences."""
    best = p.compiled_speed or p.speed
    if best is None:
        return []
    found = ["times are estimates:", *best.assumptions]
    if p.compiled_speed and p.speed:
        off = p.speed.seconds / p.compiled_speed.seconds - 1
        if abs(off) > FAR_OFF:
            found.append(f"by arithmetic it is {off:+.0%} of the time as compiled")
    return found


def as_data(p: Any) -> dict[str, Any]:
    """A Plan as plain values under its attributes' names: bytes, FLOPs and seconds of
    one device; what was found beside it is `next_best`."""
    own = dataclasses.fields(RECIPES[name_of(p.config)].config)
    rest = (dataclasses.replace(other, found=()) for other in p.found[1:])
    names = {field.name for field in dataclasses.fields(p)} - {"config", "found"}
    return {
        "recipe": name_of(p.config),
        "config": {f.name: as_text(getattr(p.config, f.name)) for f in own},
        **{name: getattr(p, name) for name in ("fits", "peak", "total", "usable")},
        **{name: _plain(getattr(p, name)) for name in sorted(names)},
        "next_best": [as_data(other) for other in rest],
    }


def _plain(x: Any) -> Any:
    """NamedTuples as dicts, a Speed with its sum."""
    if hasattr(x, "_asdict"):
        sums = {"seconds": x.seconds} if isinstance(x, Speed) else {}
        return sums | _plain(x._asdict())
    if isinstance(x, dict):
        return {name: _plain(value) for name, value in x.items()}
    return [_plain(one) for one in x] if isinstance(x, tuple) else x


def write_page(path: str | Path, p: Any) -> None:
    """The plan as a page that refers to no other file."""
    title, where, how = head(p)
    tables = [
        (account, max((row[1] or 0.0 for row in account.rows), default=0.0))
        for account in accounts(p)
    ]
    said, *advice = verdict(p)
    best = p.compiled_speed or p.speed
    tiles = {"peak, GiB": p.peak / GIB, "verdict": said.split(" in ")[0]}
    if best:
        tiles |= {"seconds": best.seconds, "MFU": f"{best.mfu:.1%}"}
    text = render(
        "plan.html.j2",
        title=title,
        note=f"{where}; {how}",
        warnings=[said, *advice] if p.fits is False else [],
        tiles=tiles,
        tables=tables,
        said=[said, *advice],
        command=p.command,
        assumptions=assumptions(p)[1:],
    )
    write_text(located(path), text)

"""The columns that mean something, as data, which of them a row is read by, and
`--columns`: other names for them.

A row is read by what it holds itself, never by what the first row held. A column that
means something is read or refused; docs/data.md shows the table.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from jalign.data.rows import RowError, parse_rows
from jalign.settings import nearest

logger = logging.getLogger("jalign.data")
T = TypeVar("T")

TURNS = ("messages", "conversations", "conversation")
"""Whole conversations, best first."""

PROMPTS: dict[str, tuple[str, ...]] = {
    "prompt": (),
    "instruction": ("input", "context"),
    "question": ("context",),
    "query": (),
    "problem": (),
    "input": (),
}
"""What is asked, best first, with the columns that are put behind it. `prompt` is text
or messages, as it stands; any other one is the user's turn of a conversation."""

ASKING = (*PROMPTS, "context")
ANSWERS = ("completion", "response", "output", "solution", "answer")
"""What is to be answered, best first."""

PAIRS = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("response_j", "response_k"),  # lvwerra/stack-exchange-paired: j is the better one
)
SYSTEM = ("system", "system_prompt")
BESIDE = ("tools", "chat_template_kwargs")
"""Variables for the chat template."""

_MEDIA = "holds images or sound, which are not supported"
_LABEL = (
    "says whether the answer is a good one, which nothing here reads: keep the rows "
    "with good ones, and leave the column out by --columns ignore={}"
)
REFUSED: dict[str, str] = dict.fromkeys(
    "images image videos video audios audio".split(), _MEDIA
)
REFUSED_IN_TRAINING = {
    "label": _LABEL,
    "labels": _LABEL,
    "weight": "weighs the row, which is not supported; drop it by --columns ignore={}",
}
REFUSED_SHAPES = {
    "message_id parent_id text role": "is one message of a tree, as in OASST: "
    "join the messages from the root to each leaf to one row of `messages`",
    "conversation_a conversation_b": "is a vote between two conversations: make "
    "`chosen` and `rejected` of them, and leave ties out",
    "history human_ref_A human_ref_B": "is a vote, as in SHP: make `prompt`, "
    "`chosen` and `rejected` of it",
}
"""Columns that say it all together, and what to do."""
KNOWN_COLUMNS = tuple(
    dict.fromkeys(
        [*TURNS, *ASKING, *ANSWERS, "text", *sum(PAIRS, ()), *SYSTEM]
        + [*BESIDE, "history", "margin"]
    )
)


Columns = str | Mapping[str, str | Sequence[str]] | None
IGNORE = "ignore"
PLAIN = {"prompt", "completion", "chosen", "rejected", "messages", "text", "margin"}
"""Columns of which it need not be said that they are read."""


class Layout(NamedTuple):
    """Names of the columns that a row is read by.

    Attributes:
      turns: a whole conversation.
      prompt: what is asked, and what is put behind it; () if nothing says it.
      answers: () or the completion's or chosen's and rejected's.
      text: a document.
      system, history: what goes before the prompt, as turns.
      beside: what is read as well.
    """

    turns: str | None = None
    prompt: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    text: str | None = None
    system: str | None = None
    history: str | None = None
    beside: tuple[str, ...] = BESIDE

    @property
    def names(self) -> tuple[str, ...]:
        """Of those that hold text."""
        single = (self.turns, self.text, self.system, self.history)
        return (*self.prompt, *self.answers, *filter(None, single))

    @property
    def is_chat(self) -> bool:
        """Whether a prompt of strings is the user's turn of a conversation."""
        return bool(self.prompt[:1] != ("prompt",) or self.system or self.history)


def sft_layout(row: dict[str, Any]) -> Layout:
    """A conversation, a prompt with its answer, or a text, in this order.

    Raises: RowError.
    """
    _refuse(row, REFUSED | REFUSED_IN_TRAINING)
    turns, prompt = _first(row, TURNS), _prompt(row)
    answer = _first(row, ANSWERS)
    if turns:
        return _with_system(row, Layout(turns=turns))
    if has_pair(row):
        raise RowError("(row)", _pair_advice(row, prompt))
    if prompt and answer:
        layout = _with_system(row, Layout(prompt=prompt, answers=(answer,)))
        others = [] if answer == "completion" else ANSWERS
        return _check_rest(row, layout, [*ASKING, *others])
    if _first(row, ["text"]):
        others = [*ASKING, *ANSWERS, *SYSTEM, "history"]
        return _check_rest(row, Layout(text="text"), others)
    null = next((name for name in ANSWERS if prompt and name in row), None)
    if null or answer == "completion":
        raise RowError(null or "prompt", "missing or null")
    raise _unknown(row, "messages, conversations, prompt + completion, or text")


def preference_layout(row: dict[str, Any]) -> Layout:
    """Two answers, with or without a column that says the prompt. Raises: RowError."""
    return _pair_layout(row, REFUSED | REFUSED_IN_TRAINING)


def _pair_layout(row: dict[str, Any], refused: dict[str, str]) -> Layout:
    _refuse(row, refused)
    pair = next((p for p in PAIRS if p[0] in row or p[1] in row), None)
    if pair is None:
        raise _unknown(row, "chosen + rejected, and optionally prompt")
    prompt = _prompt(row)
    if not prompt and "prompt" in row:
        raise RowError("prompt", "missing or null")
    layout = Layout(prompt=prompt, answers=pair, beside=(*BESIDE, "margin"))
    return _check_rest(row, _with_system(row, layout), ASKING)


def prompt_layout(row: dict[str, Any]) -> Layout:
    """What `preference_layout` puts before the answers where there are two, and
    `sft_layout` where there are not. What else the row holds is for reward functions.

    Raises: RowError.
    """
    if has_pair(row):
        return _pair_layout(row, REFUSED)._replace(beside=BESIDE)
    _refuse(row, REFUSED)
    turns, prompt = _first(row, TURNS), _prompt(row)
    if turns:
        return _with_system(row, Layout(turns=turns))
    if prompt:
        return _check_rest(row, _with_system(row, Layout(prompt=prompt)), ASKING)
    raise _unknown(row, "prompt, messages or conversations")


def has_pair(row: dict[str, Any]) -> bool:
    """Whether the row holds two answers to compare."""
    return any(all(row.get(name) is not None for name in pair) for pair in PAIRS)


def _pair_advice(row: dict[str, Any], prompt: tuple[str, ...]) -> str:
    """What to do with a pair where one answer is trained."""
    better, worse = next(p for p in PAIRS if all(row.get(n) is not None for n in p))
    turns = row[better] if isinstance(row[better], list) else []
    whole = turns and isinstance(turns[0], dict) and turns[0].get("role") != "assistant"
    columns = f"{'messages' if whole else 'completion'}={better}"
    if turns and not whole and prompt and isinstance(row[prompt[0]], str):
        columns += f" with {prompt[0]} as a list of messages too"
    advice = "is a preference pair: train a reward model or DPO on it, or its better "
    advice += f"side, by --columns {columns}"
    if prompt and _first(row, ANSWERS):
        advice += f", or the other answer, by --columns ignore={worse}"
    return advice


def split_columns(
    rows: Iterable[dict[str, Any]], layout_of: Callable[[dict], Layout]
) -> tuple[list[str], list[str]]:
    """(the columns that some row is read by, those that none is), in their order."""
    kinds = {}  # rows in which the same columns hold something are read alike
    for row in rows:
        kinds.setdefault(frozenset(k for k, v in row.items() if v is not None), row)
    used: set[str] = set()
    for row in kinds.values():
        try:
            layout = layout_of(row)
        except RowError:
            continue
        behind = (PROMPTS.get(name, ()) for name in layout.prompt)
        used.update(layout.names, layout.beside, *behind)
    names = dict.fromkeys(name for row in kinds.values() for name in row)
    read = [name for name in names if name in used]
    return read, [name for name in names if name not in used]


def is_blank(value: Any) -> bool:
    """Whether a column holds nothing: null, white space, an empty list or object."""
    return not (value.strip() if isinstance(value, str) else value or value == 0)


def _first(row: dict[str, Any], names: Iterable[str]) -> str | None:
    return next((name for name in names if row.get(name) is not None), None)


def _prompt(row: dict[str, Any]) -> tuple[str, ...]:
    name = _first(row, PROMPTS)
    if name is None:
        return ()
    return (name, *(more for more in PROMPTS[name] if not is_blank(row.get(more))))


def _with_system(row: dict[str, Any], layout: Layout) -> Layout:
    """With the columns that go before the prompt, if the row has them."""
    said = [name for name in SYSTEM if not is_blank(row.get(name))]
    if len(said) > 1 and row[said[0]] != row[said[1]]:
        raise RowError(said[1], f"says another thing than {said[0]}")
    # A null one counts as well: one row of a data set is not templated while the next
    # is not.
    system = [*said, *(name for name in SYSTEM if name in row)]
    history = "history" if "history" in row else None
    return layout._replace(system=system[0] if system else None, history=history)


def _refuse(row: dict[str, Any], refused: dict[str, str]) -> None:
    for names, advice in REFUSED_SHAPES.items():
        if all(name in row for name in names.split()):
            raise RowError("(row)", advice)
    for name, advice in refused.items():
        value = row.get(name)
        if not is_blank(value) and not (name == "weight" and value == 1):
            raise RowError(name, advice.format(name))


def _check_rest(row: dict[str, Any], layout: Layout, names: Sequence[str]) -> Layout:
    """Refuses a column that says something which the columns read do not hold."""
    rest = [n for n in names if n not in layout.names and not is_blank(row.get(n))]
    if rest:
        held = "\n".join(_text(row.get(name)) for name in layout.names)
        for name in rest:
            if not isinstance(row[name], str) or row[name].strip() not in held:
                raise RowError(
                    name,
                    f"is not read beside {' + '.join(layout.names)}, and says "
                    f"something else: choose by --columns NAME={name}, or leave it "
                    f"out by --columns ignore={name}",
                )
    return layout


def _text(value: Any) -> str:
    """All strings in a column, below each other."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return "\n".join(map(_text, value))
    return value if isinstance(value, str) else ""


def _unknown(row: dict[str, Any], expected: str) -> RowError:
    for field in expected.replace(",", " ").split():
        if field in row and row[field] is None:
            return RowError(field, "missing or null")
    keys = ", ".join(sorted(map(str, row))[:8]) or "none"
    return RowError(
        "(row)",
        f"has the fields {keys}; expected {expected}, or another known layout; "
        "--columns NAME=COLUMN names them",
    )


def parse_by_columns(
    rows: Sequence[dict],
    parse: Callable[[dict], T],
    layout_of: Callable[[dict], Layout] | None,
    columns: Columns,
) -> list[T | RowError]:
    """The record of each row, or what is wrong with it.

    Says once which columns are read and which are not.

    Args:
      rows: as they were read.
      parse: a row under its known names -> a record; may raise RowError.
      layout_of: the same row -> which of its columns `parse` reads; None checks and
        says nothing: for a few rows of a data set that is read as a whole as well.
      columns: as in `parse_columns`.

    Raises: ValueError for columns that are not there, or not read.
    """
    names = parse_columns(columns)
    if layout_of:
        check_columns(names, rows)
    renamed = (rename(row, names) for row in rows if isinstance(row, dict))
    read, unread = split_columns(renamed, layout_of) if layout_of else ([], [])
    # An answer is left to the reward functions where only prompts are read.
    answers = {*ANSWERS, *sum(PAIRS, ())} if layout_of is prompt_layout else set()
    for name in sorted((names.keys() & set(unread)) - answers):
        _refuse_unread(name, read, names)
    if unread or not PLAIN.issuperset(read):
        shown = [", ".join(map(str, found)) or "none" for found in (read, unread)]
        logger.info("columns read: %s; not read: %s", *shown)
    return parse_rows(rows, lambda row: parse(rename(row, names)))


def _refuse_unread(name: str, read: list[str], names: Mapping[str, Any]) -> None:
    """Raises ValueError that names the columns which go before one given by name."""
    ahead = [other for other in read if other not in BESIDE]
    if not ahead:
        return  # no row can be read, which is said of the rows
    shown = [f"{n} ({names[n][0]!r})" if n in names else repr(n) for n in ahead]
    drop = next((other for other in ahead if other not in names), None)
    advice = f"leave {drop!r} out by {IGNORE}={drop}" if drop else "name only one"
    raise ValueError(
        f"columns: {name!r} is not read, as the rows are read by {', '.join(shown)}: "
        f"{advice}, or leave {name}={names[name][0]} out"
    )


def parse_columns(columns: Columns) -> dict[str, tuple[str, ...]]:
    """{a known name: the columns of the data that are meant}.

    Args:
      columns: "prompt=question,completion=answer", or a mapping of the same. Each
        known name takes one column; "ignore" takes any number ("ignore=label").

    Raises: ValueError naming what is not known, with the nearest.
    """
    if isinstance(columns, str):
        parts = [part.partition("=") for part in columns.split(",") if part.strip()]
        given = [(target, [source]) for target, _, source in parts]
    else:
        given = list((columns or {}).items())
    found: dict[str, tuple[str, ...]] = {}
    for target, value in given:
        target = target.strip()
        sources = [value] if isinstance(value, str) else value
        sources = tuple(source.strip() for source in sources)
        if not target or not all(sources):
            raise ValueError(
                f"columns {columns!r}: expected NAME=COLUMN, with commas between"
            )
        if target not in KNOWN_COLUMNS and target != IGNORE:
            known = [*KNOWN_COLUMNS, IGNORE]
            raise ValueError(
                f"columns: nothing reads {target!r}{nearest(target, known)}"
            )
        if target != IGNORE and (target in found or len(sources) > 1):
            raise ValueError(f"columns: {target!r} is given twice")
        found[target] = (*found.get(target, ()), *sources)
    return found


def check_columns(columns: Mapping[str, Sequence[str]], rows: Iterable[dict]) -> None:
    """Raises ValueError for a column that no row has, with the nearest that one has."""
    wanted = {source for sources in columns.values() for source in sources}
    if not wanted:
        return
    present: dict[str, None] = {}
    for row in rows:
        if isinstance(row, dict):
            present.update(dict.fromkeys(map(str, row)))
    for source in sorted(wanted - present.keys()):
        listed = ", ".join(present) or "none"
        raise ValueError(
            f"columns: no row has {source!r}{nearest(source, present)} (of {listed})"
        )


def are_pairs(rows: Sequence[dict], columns: Columns = None) -> bool:
    """Whether the first row holds two answers to compare, not one."""
    names = parse_columns(columns)
    return bool(rows) and has_pair(rename(rows[0], names))


def rename(row: dict[str, Any], columns: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The row as if its columns were called so; those renamed over are left out."""
    if not columns:
        return row
    sources = {source for names in columns.values() for source in names}
    kept = {k: v for k, v in row.items() if k not in sources and k not in columns}
    named = {k: row[v[0]] for k, v in columns.items() if k != IGNORE and v[0] in row}
    return kept | named

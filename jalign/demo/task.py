"""A tiny language, a wish about it, and a judge that knows the wish exactly.

A prompt asks for a story about somebody and a thing; a reply opens, goes through one
or two events, and ends well or badly:

    prompt:  Tell a story about Mia and the red kite.
    reply:    Mia took the red kite to the park. A dog ran by. Mia hugged the kite.

Wanted is a reply that is a story of this grammar, is about the person and the thing of
the prompt, and ends well. `judge` decides that from the text alone, by the grammar that
also writes the data (scripts/make_demo_model.py), so no trained model is asked how well
training went. A happy word,
a repeated sentence or a story about another thing is not enough.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

SLOTS = {
    "name": "Mia Tom Ana Ben Lily Max Zoe Sam Ella Leo Ida Tim Nora Jack Ruby Finn "
    "Rosa Hugo Emma Otto Lucy Carl Nina Paul",
    "thing": "kite ball drum hat boat book lamp cup bell cake toy box coat ring map "
    "fan flag doll top bike shell horn mask rope pen bowl chair stone plant basket",
    "colour": "red blue green yellow white black pink brown small big old new",
    "place": "park garden river market forest beach school farm hill barn harbor lake",
    "animal": "dog cat bird fox horse duck goat frog mouse cow",
    "weather": "wind rain snow sun fog storm",
}
WORDS = {slot: words.split() for slot, words in SLOTS.items()}

PROMPTS = ("Tell a story about {name} and the {colour} {thing}.",)
# Roles of sentences, in the order they have in a story.
OPENINGS = (
    "{name} took the {colour} {thing} to the {place}.",
    "{name} carried the {colour} {thing} along the {place}.",
    "One day {name} found the {colour} {thing} near the {place}.",
    "{name} went to the {place} with the {colour} {thing}.",
    "At the {place} {name} played with the {colour} {thing}.",
)
EVENTS = (
    "A {animal} ran by.",
    "A {animal} came to look.",
    "There was a {animal} behind the tree.",
    "Then the {weather} came over the {place}.",
    "The {weather} was strong that day.",
    "Soon {name} came along with a {animal}.",
    "It was quiet at the {place}.",
    "They walked all the way to the {place}.",
)
HAPPY = (
    "{name} hugged the {thing} and smiled.",
    "In the end {name} danced with the {thing}.",
    "{name} laughed, and the {thing} was safe.",
    "{name} loved the {thing} and sang all day.",
    "So {name} kept the {thing} and was happy.",
)
SAD = (
    "{name} broke the {thing} and cried.",
    "In the end {name} lost the {thing}.",
    "{name} wept, and the {thing} was gone.",
    "{name} hated the {thing} and went home angry.",
    "So {name} threw away the {thing} and was sad.",
)
# Model -> what it was made from.
MADE_FROM = {"SFT": "base", "PPO": "SFT", "DPO": "SFT"}
Rows = Sequence[Mapping[str, Any]]
"""Of the demo's table: a model each, with its figures."""


class Verdict(NamedTuple):
    """What the judge finds in a reply; it is preferred if all three hold.

    Attributes:
      well_formed: opening, one or two different events, ending; nothing else.
      on_topic: opening and ending are about the person and the thing of the prompt.
      happy: the ending is a good one.
    """

    well_formed: bool
    on_topic: bool
    happy: bool

    @property
    def preferred(self) -> bool:
        return all(self)


def _pattern(template: str) -> re.Pattern[str]:
    """The regex of a template's sentences, with a group for each slot."""
    text = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    groups = {slot: f"(?P<{slot}>{'|'.join(words)})" for slot, words in WORDS.items()}
    return re.compile(text.format(**groups))


_PATTERNS = {
    role: tuple(map(_pattern, templates))
    for role, templates in {
        "prompt": PROMPTS,
        "opening": OPENINGS,
        "event": EVENTS,
        "happy": HAPPY,
        "sad": SAD,
    }.items()
}


def parse(sentence: str, role: str) -> dict[str, str] | None:
    """The words in a sentence's slots, or None if it is not a sentence of the role."""
    for pattern in _PATTERNS[role]:
        if match := pattern.fullmatch(sentence):
            return match.groupdict()
    return None


def judge(prompt: str, completion: str) -> Verdict:
    """The ground truth about one reply.

    Args:
      prompt: a prompt of this task.
      completion: the generated text after the prompt, without the stop token.

    Returns: a Verdict, all False where the reply is not a story of the grammar.
    Raises: ValueError if the prompt is not one of this task.
    """
    asked = parse(prompt.strip(), "prompt")
    if asked is None:
        raise ValueError(f"not a prompt of the demo task: {prompt!r}")
    sentences = re.findall(r"[^.]+\.?", completion.strip())
    sentences = [sentence.strip() for sentence in sentences]
    if not 3 <= len(sentences) <= 4 or len(set(sentences)) < len(sentences):
        return Verdict(False, False, False)
    opening = parse(sentences[0], "opening")
    events = [parse(sentence, "event") for sentence in sentences[1:-1]]
    happy, sad = (parse(sentences[-1], role) for role in ("happy", "sad"))
    ending = happy or sad
    if opening is None or ending is None or None in events:
        return Verdict(False, False, False)
    topics = [(s["name"], s["thing"]) for s in (asked, opening, ending)]
    return Verdict(True, len(set(topics)) == 1, happy is not None)


def reward(prompts: Sequence[str], completions: Sequence[str], rows=None) -> np.ndarray:
    """The judge as a reward function: float32 [B], 1 for a preferred reply, else 0."""
    pairs = zip(prompts, completions, strict=True)
    return np.array([judge(p, c).preferred for p, c in pairs], np.float32)


def worse(rows: Rows) -> list[str]:
    """The models that are preferred less often than what they were made from."""
    share = {row["model"]: row["preferred"] for row in rows}
    pairs = [pair for pair in MADE_FROM.items() if share.keys() >= set(pair)]
    return [name for name, before in pairs if share[name] < share[before]]


def format_table(rows: Rows) -> str:
    """The rows as an aligned table; shares as percentages, in red what got worse."""
    cells = [list(rows[0])] + [list(as_text(row).values()) for row in rows]
    bad = worse(rows)
    for row in cells[1:]:
        row[0] += " (worse)" if row[0] in bad else ""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        first, *rest = zip(row, widths, strict=True)
        text = "  ".join([f"{first[0]:<{first[1]}}", *(f"{c:>{w}}" for c, w in rest)])
        red = row[0].endswith(" (worse)") and sys.stdout.isatty()
        return f"\x1b[31m{text}\x1b[0m" if red else text

    header, *body = map(line, cells)
    return "\n".join([header, "─" * len(header), *body])


def as_text(row: Mapping[str, Any]) -> dict[str, str]:
    """The row's figures for a reader."""

    def text(name: str, value: Any) -> str:
        if value is None or isinstance(value, str):
            return value or "–"
        if name == "seconds":
            return f"{value:.0f}"
        return f"{value:.2f}" if name == "KL to SFT" else f"{value:.1%}"

    return {name: text(name, value) for name, value in row.items()}


def findings(rows: Rows, seconds: float) -> dict[str, Any]:
    """The report's summary, table and warnings, of the table's rows."""
    table: list[dict[str, Any]] = [dict(as_text(row)) for row in rows]
    by_model = {row["model"]: dict(row) for row in table}
    bad = worse(rows)
    for row in table:
        if row["model"] in bad:
            row["preferred"] = {"text": row["preferred"], "bad": True}
    summary = {
        "preferred replies, SFT": by_model["SFT"]["preferred"],
        "with PPO": by_model["PPO"]["preferred"],
        "with DPO": by_model["DPO"]["preferred"],
        "reward model's accuracy": by_model["reward model"]["reward accuracy"],
        "seconds in all": f"{seconds:.0f}",
    }
    warnings = [
        f"{name} ended worse than {MADE_FROM[name]}: preferred "
        f"{by_model[MADE_FROM[name]]['preferred']} -> {by_model[name]['preferred']}"
        for name in bad
    ]
    return {"summary": summary, "table": table, "warnings": warnings}


def samples_of(
    prompts: Sequence[str], replies: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """Prompts with what each model replies, judged."""

    return [
        {"prompt": prompt}
        | {
            name: {"text": texts[i], "good": judge(prompt, texts[i]).preferred}
            for name, texts in replies.items()
        }
        for i, prompt in enumerate(prompts)
    ]

"""A tiny language, a wish about it, and a judge that knows the wish exactly.

A prompt asks for a story about somebody and a thing; a reply opens, goes through one
or two events, and ends well or badly:

    prompt:  Tell a story about Mia and the red kite.
    reply:    Mia took the red kite to the park. A dog ran by. Mia hugged the kite.

Wanted is a reply that is a story of this grammar, is about the person and the thing of
the prompt, and ends well. `judge` decides that from the text alone, by the grammar that
also writes the data, so no trained model is asked how well training went. A happy word,
a repeated sentence or a story about another thing is not enough.
"""

import random
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

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
FACTS = (
    "The {thing} is {colour}.",
    "{name} lives near the {place}.",
    "{name} has a {animal}.",
    "There is a {colour} {thing} in the {place}.",
    "This is a story about {name} and the {colour} {thing}.",
)
# Chances under which about half of what the tuned model replies is what is wanted.
HAPPY_RATE, ON_TOPIC_RATE = 0.55, 0.98
# What is wrong off the topic: the person at least. A reward model sees that soon; a
# wrong thing with the right person it saw after 150 steps or after 400, by the seed.
WRONG_SLOTS = (("name",), ("name", "thing"))


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


def _fill(rng: random.Random, templates: Sequence[str], **fixed: str) -> str:
    """A random template with its slots filled, the given ones as given."""
    words = {slot: rng.choice(choices) for slot, choices in WORDS.items()} | fixed
    return rng.choice(templates).format(**words)


def _topic(rng: random.Random) -> dict[str, str]:
    return {slot: rng.choice(WORDS[slot]) for slot in ("name", "colour", "thing")}


def make_reply(
    rng: random.Random, topic: dict[str, str], *, on_topic: bool, happy: bool
) -> str:
    """A well-formed reply to a topic, with a leading space.

    Off the topic, the person, the thing or both are others, from the start or only in
    the ending.
    """
    topic = {slot: topic[slot] for slot in ("name", "colour", "thing")}
    ending = {slot: topic[slot] for slot in ("name", "thing")}
    if not on_topic:
        for slot in rng.choice(WRONG_SLOTS):
            ending[slot] = rng.choice([w for w in WORDS[slot] if w != topic[slot]])
        topic |= ending if rng.random() < 0.5 else {}
    events = list(dict.fromkeys(_fill(rng, EVENTS) for _ in range(rng.choice((1, 2)))))
    parts = [_fill(rng, OPENINGS, **topic), *events]
    return " " + " ".join([*parts, _fill(rng, HAPPY if happy else SAD, **ending)])


def sft_rows(seed: int, prompts: Sequence[str]) -> Iterator[dict[str, str]]:
    """A demonstration for each prompt; about half are what is wanted."""
    rng = random.Random(f"sft-{seed}")
    for prompt in prompts:
        on_topic, happy = rng.random() < ON_TOPIC_RATE, rng.random() < HAPPY_RATE
        topic = parse(prompt, "prompt") or {}
        reply = make_reply(rng, topic, on_topic=on_topic, happy=happy)
        yield {"prompt": prompt, "completion": reply}


def make_malformed(rng: random.Random, topic: dict[str, str]) -> str:
    """A reply that is wanted but for its form.

    It is unfinished, repetitive or rambling, its last full stop is missing, or a word
    is missing or too many: the tuned model's own slips. What the pairs do not show, PPO
    finds out, and is rewarded for.
    """
    reply = make_reply(rng, topic, on_topic=True, happy=True)
    kind = rng.random()
    if kind < 0.6:
        return reply[:-1] if kind < 0.1 else _slip(rng, reply)
    opening, event, *_, ending = re.findall(r" [^.]+\.", reply)
    fact = " " + _fill(rng, FACTS, **topic)
    faults = (
        [event],
        [ending],
        [" In the end.", ending],
        [event, event, ending],
        [fact, event, ending],
        [event] + 2 * [ending],
    )
    return opening + "".join(rng.choice(faults))


def _slip(rng: random.Random, reply: str) -> str:
    """The reply with a word left out, said twice, or put in from elsewhere."""
    words = reply.split()
    place = rng.randrange(len(words))
    stray = rng.choice(WORDS[rng.choice(list(WORDS))])
    word = words[place]
    words[place : place + 1] = rng.choice(([], [word, word], [stray, word]))
    return " " + " ".join(words)


def preference_rows(seed: int, prompts: Sequence[str]) -> Iterator[dict[str, str]]:
    """A wanted reply for each prompt, and one that fails by topic, ending or form."""
    rng = random.Random(f"preferences-{seed}")
    for prompt in prompts:
        topic = parse(prompt, "prompt") or {}
        chosen = make_reply(rng, topic, on_topic=True, happy=True)
        # The harder to see, the more pairs: topic, form, mood.
        (failure,) = rng.choices(("topic", "form", "mood"), (5, 3, 2))
        if failure == "form":
            rejected = make_malformed(rng, topic)
        else:
            on_topic, happy = failure != "topic", failure != "mood"
            rejected = make_reply(rng, topic, on_topic=on_topic, happy=happy)
        yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def make_prompts(seed: int, count: int, *, held_out: bool) -> list[str]:
    """Different prompts; those of the held-out side never occur on the other side."""
    rng, found = random.Random(f"prompts-{seed}-{held_out}"), {}
    while len(found) < count:
        topic = _topic(rng)
        person, thing = (WORDS[s].index(topic[s]) for s in ("name", "thing"))
        # Every tenth pair of a person and a thing is kept for the held-out side.
        if ((7 * person + thing) % 10 == 0) == held_out:
            found[PROMPTS[0].format(**topic)] = None
    return list(found)


def base_documents(seed: int) -> Iterator[str]:
    """Endless broader text for pre-training: facts and long, wandering stories.

    It holds every sentence of the language, and prompts with stories behind them, but
    stories that ramble, mix in facts, and end anywhere: what a reply looks like is left
    for supervised fine-tuning to teach.
    """
    rng = random.Random(f"base-{seed}")
    while True:
        topic, parts = _topic(rng), []
        if rng.random() < 0.5:
            parts.append(_fill(rng, (*PROMPTS, FACTS[-1]), **topic))
        for _ in range(rng.randint(1, 2)):
            parts.append(_fill(rng, OPENINGS, **topic))
            for _ in range(rng.randint(0, 4)):
                about_topic = rng.random() < 0.3
                parts.append(
                    _fill(rng, FACTS, **topic) if about_topic else _fill(rng, EVENTS)
                )
            ending = {slot: topic[slot] for slot in ("name", "thing")}
            parts.append(_fill(rng, HAPPY + SAD, **ending))
            if rng.random() < 0.2:
                topic = _topic(rng)
        yield " ".join(parts[: rng.randint(2, len(parts))])

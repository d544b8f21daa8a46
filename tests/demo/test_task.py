"""Tests for jalign/demo/task.py and for what scripts/make_demo_model.py writes with it:
the judge is right, and hard to fool."""

import itertools
import random
import re

import numpy as np
import pytest

from jalign.demo import task
from tests.demo.scripts import load_maker

maker = load_maker()

PROMPT = "Tell a story about Mia and the red kite."
GOOD = (
    " Mia took the red kite to the park. A dog ran by. Mia hugged the kite and smiled."
)
FOOLING = {
    "nothing": "",
    "a happy word": " happy happy happy happy",
    "the ending alone": " Mia hugged the kite and smiled.",
    "the ending repeated": " Mia hugged the kite and smiled." * 3,
    "no event": " Mia took the red kite to the park. Mia hugged the kite and smiled.",
    "an event twice": GOOD.replace("A dog ran by.", "A dog ran by. A dog ran by."),
    "no end": GOOD + " A dog ran by.",
    "text before it": " yes" + GOOD,
    "cut off": GOOD[:-1],
    "a word of another language": GOOD.replace("dog", "chien"),
    "two stories": GOOD + GOOD,
}


def test_a_good_reply_is_preferred():
    assert task.judge(PROMPT, GOOD) == task.Verdict(True, True, True)
    assert task.judge(PROMPT, GOOD + "\n").preferred


@pytest.mark.parametrize("completion", FOOLING.values(), ids=FOOLING.keys())
def test_what_is_not_a_story_is_not_preferred(completion):
    assert task.judge(PROMPT, completion) == task.Verdict(False, False, False)


def test_topic_and_mood_are_both_asked_for():
    sad = GOOD.replace("hugged the kite and smiled", "broke the kite and cried")
    assert task.judge(PROMPT, sad) == task.Verdict(True, True, False)
    other = GOOD.replace("kite", "drum")
    assert task.judge(PROMPT, other) == task.Verdict(True, False, True)
    mixed = GOOD.replace("hugged the kite", "hugged the drum")
    assert task.judge(PROMPT, mixed) == task.Verdict(True, False, True)
    person = GOOD.replace("Mia", "Tom")
    assert task.judge(PROMPT, person) == task.Verdict(True, False, True)


def test_a_foreign_prompt_is_an_error():
    with pytest.raises(ValueError, match="not a prompt of the demo task"):
        task.judge("Hello?", GOOD)


def test_the_reward_function_has_the_shape_of_one():
    rewards = task.reward([PROMPT, PROMPT], [GOOD, ""], [{}, {}])
    assert rewards.dtype == np.float32 and rewards.tolist() == [1.0, 0.0]


def test_the_generator_is_what_the_judge_expects():
    rng = random.Random(0)
    topic = task.parse(PROMPT, "prompt")
    for on_topic, happy in itertools.product((True, False), repeat=2):
        for _ in range(200):
            reply = maker.make_reply(rng, topic, on_topic=on_topic, happy=happy)
            assert task.judge(PROMPT, reply) == (True, on_topic, happy), reply


def test_demonstrations_are_little_over_half_and_pairs_are_right():
    prompts = maker.make_prompts(0, 1000, held_out=False)
    rows = list(maker.sft_rows(0, prompts))
    rate = np.mean([task.judge(r["prompt"], r["completion"]).preferred for r in rows])
    assert 0.5 < rate < 0.6
    for row in maker.preference_rows(0, prompts):
        assert task.judge(row["prompt"], row["chosen"]).preferred
        assert not task.judge(row["prompt"], row["rejected"]).preferred


def test_held_out_prompts_ask_for_pairs_never_trained():
    def topics(held_out):
        prompts = maker.make_prompts(0, 400, held_out=held_out)
        asked = [task.parse(prompt, "prompt") for prompt in prompts]
        assert len(set(prompts)) == 400
        return {(a["name"], a["thing"]) for a in asked}

    assert not topics(True) & topics(False)


def test_everything_is_a_function_of_the_seed():
    assert maker.make_prompts(1, 20, held_out=True) == maker.make_prompts(
        1, 20, held_out=True
    )
    assert maker.make_prompts(1, 20, held_out=True) != maker.make_prompts(
        2, 20, held_out=True
    )
    first, again, other = (
        list(itertools.islice(maker.base_documents(s), 20)) for s in (0, 0, 1)
    )
    assert first == again != other


def test_base_text_is_broader_than_the_task():
    documents = list(itertools.islice(maker.base_documents(0), 500))
    asked = [d for d in documents if d.startswith("Tell a story")]
    assert 0.1 < len(asked) / len(documents) < 0.4
    replies = [re.split(r"(?<=\.)", d, maxsplit=1) for d in asked]
    assert np.mean([task.judge(p, r).preferred for p, r in replies]) < 0.02

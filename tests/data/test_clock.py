"""A template's clock stands still in a run, whatever it asks for."""

import string
from datetime import datetime

import pytest

from jalign import data
from jalign.data.templates import fixed_clock
from tests.train.ppo_world import make_tokenizer

NOW = datetime(2031, 2, 3, 4, 5, 6, 789)
FORMATS = ["%d %b %Y", "%Y-%m-%dT%H:%M:%S.%f", "100%% on %A%%, %-d/%-m", "no date", "%"]


@pytest.mark.parametrize("generation", [False, True])
def test_both_ways_through_a_template_say_the_fixed_moment(generation):
    tokenizer = make_tokenizer()
    answer = "{{ m.content }} {{ eos_token }}"
    if generation:
        answer = "{% generation %}" + answer + "{% endgeneration %}"
    texts = [*FORMATS, *(f"%{letter} x" for letter in string.ascii_letters)]
    shown = []
    # The tokenizer's words are letters: what is rendered is looked at through decode.
    real = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda *a, **k: (
        shown.append(real(*a, **k)) or (shown[-1])
    )
    for text in texts:
        tokenizer.chat_template = (
            (
                "{% if strftime_now is defined %}{{ strftime_now(FORMAT) }}{% endif %}|"
                "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} "
                "{% else %}ANSWER{% endif %}{% endfor %}"
            )
            .replace("FORMAT", repr(text))
            .replace("ANSWER", answer)
        )
        turns = [("user", "a b"), ("assistant", "c d")]
        row = {"messages": [{"role": r, "content": c} for r, c in turns]}
        with fixed_clock(NOW):
            data.sft_examples([row], tokenizer, max_length=16)
        rendered = [x for x in shown if isinstance(x, str)]
        assert rendered[-1].partition("|")[0] == NOW.strftime(text)
        assert tokenizer.chat_template.startswith("{% if"), "it is exported as it was"


def test_outside_of_a_run_it_is_now():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%Y') }}"
    text = data.chat.render(tokenizer, [{"role": "user", "content": "a"}], {})
    assert abs(int(text) - datetime.now().year) <= 1

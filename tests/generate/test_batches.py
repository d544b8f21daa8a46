import jax
import pytest

from jalign import generate
from tests.generate.doubles import HistoryModel

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [2, 2], [3]]


def test_the_batch_size_changes_nothing(key):
    model = HistoryModel()
    params = model.init(key)
    how = dict(key=jax.random.key(3), max_new_tokens=6, stop_tokens=[7])
    whole = generate.completion_lists(generate.generate(model, params, PROMPTS, **how))
    for size in (1, 2, 5, 64):
        lists = generate.generate_lists(model, params, PROMPTS, batch_size=size, **how)
        assert lists == whole
    with pytest.raises(ValueError, match="batch_size"):
        generate.generate_lists(model, params, PROMPTS, batch_size=0, **how)
    with pytest.raises(ValueError, match="no prompts"):
        generate.generate_lists(model, params, [], **how)


class WordTokenizer:
    """Like SentencePiece: a space between words, none before the first."""

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return " ".join(f"w{i}" for i in ids if i)


def test_continuation_keeps_the_space_at_the_border():
    assert generate.continuation(WordTokenizer(), [1, 2], [3, 0]) == " w3"
    assert generate.continuation(WordTokenizer(), [0], [3]) == "w3"

"""What is made of rows comes back from its bytes as it was."""

import numpy as np
import pytest

from jalign.data import wire
from jalign.data.rows import RowError

BAD = RowError("messages[1].content", "empty ü \ud800")


def arrays(*lengths, dtype: type = np.int32):
    return [np.arange(n).astype(dtype) for n in lengths]


def same(one, other) -> bool:
    if isinstance(one, RowError):
        return (one.field, one.reason) == (other.field, other.reason)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return type(one) is type(other) and one == other


@pytest.mark.parametrize(
    "results",
    [
        [],
        [BAD],
        [BAD, *zip(arrays(3, 0, 2), arrays(3, 0, 2, dtype=bool), strict=True), BAD],
        list(zip(arrays(1, 5), [0, 2**40], [-1, 3], strict=True)),
        [("", arrays(0)[0]), ("a\x00ü\n\ud800", arrays(2)[0]), ("b", arrays(1)[0])],
    ],
    ids=["none", "bad", "conversations", "pairs", "prompts"],
)
def test_results_come_back_as_they_were(results):
    found = wire.from_bytes(np.frombuffer(wire.to_bytes(results), np.uint8))
    assert len(found) == len(results)
    for want, got in zip(results, found, strict=True):
        if isinstance(want, RowError):
            want, got = [want], [got]
        assert all(map(same, want, got)) and len(want) == len(got), (want, got)


def test_bytes_are_few():
    """Beside the tokens and their masks, less than 40 bytes a row."""
    results = [(np.zeros(500, np.int32), np.zeros(500, bool))] * 1000
    assert len(wire.to_bytes(results)) < 1000 * (500 * 5 + 40)

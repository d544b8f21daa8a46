"""Tests for jalign/data/loader.py."""

import subprocess
import sys
from itertools import islice

import numpy as np
import pytest

from jalign.data.batching import collate_preferences, collate_tokens
from jalign.data.examples import PreferenceExample
from jalign.data.loader import batch_indices, make_eval_loader, make_loader, num_steps
from tests.data.test_batching import example

EXAMPLES = [example(2 + i % 30, first=100 * (i + 1)) for i in range(23)]


DEFAULTS = {"batch_size": 4, "collate": collate_tokens, "max_length": 32}


def loader(examples=EXAMPLES, **options):
    return make_loader(examples, **{"seed": 0, **DEFAULTS, **options})


def eval_loader(examples=EXAMPLES, **options):
    return make_eval_loader(examples, **{**DEFAULTS, **options})


def test_every_epoch_holds_every_example_once_in_a_new_order():
    places = np.concatenate([batch_indices(23, 4, 7, step) for step in range(23)])
    epochs = places.reshape(4, 23)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(23))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_seeds_give_unrelated_orders():
    first, second = (
        np.concatenate([batch_indices(100, 100, seed, step) for step in range(3)])
        for seed in (0, 1)
    )
    # Not even a shifted one: epoch 1 of seed 0 is not epoch 0 of seed 1.
    assert not np.array_equal(first[100:200], second[:100])
    assert not np.array_equal(first[:100], second[:100])


def test_the_order_is_pinned():
    # A change here (a new grain, say) would break the resume of running jobs.
    assert batch_indices(10, 10, 3, 0).tolist() == [4, 6, 9, 7, 5, 3, 1, 8, 2, 0]
    assert batch_indices(10, 10, 3, 1).tolist() == [8, 1, 3, 7, 9, 0, 5, 4, 2, 6]


def test_resume_gives_the_same_batches():
    whole = list(loader(steps=9))
    for start in (1, 5, 8):
        resumed = list(loader(start_step=start, steps=9))
        assert len(resumed) == 9 - start
        for a, b in zip(whole[start:], resumed, strict=True):
            for x, y in zip(a, b, strict=True):
                np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_global_batch_and_its_length(hosts):
    whole = list(loader(steps=6))
    parts = [
        list(loader(steps=6, shard_index=i, shard_count=hosts)) for i in range(hosts)
    ]
    for step, batch in enumerate(whole):
        joined = np.concatenate([part[step].tokens for part in parts])
        np.testing.assert_array_equal(joined, batch.tokens)


def test_the_batch_is_what_batch_indices_says():
    for step, batch in enumerate(loader(steps=3)):
        firsts = [EXAMPLES[i].tokens[0] for i in batch_indices(23, 4, 0, step)]
        np.testing.assert_array_equal(batch.tokens[:, 0], firsts)


def test_steps_epochs_and_endless():
    assert num_steps(23, 4) == 6 and num_steps(24, 4) == 6
    assert num_steps(23, 4, epochs=3) == 18 and num_steps(1, 4) == 1
    assert len(list(loader(epochs=2))) == 12
    assert len(list(islice(loader(), 30))) == 30


def test_fewer_examples_than_rows_repeat_with_a_warning(caplog):
    (batch,) = loader(EXAMPLES[:1], steps=1)
    assert batch.tokens[:, 0].tolist() == [100] * 4
    assert "1 examples in batches of 4" in caplog.text


def test_eval_sees_every_example_once_and_fills_up():
    batches = list(eval_loader())
    assert [len(batch.tokens) for batch in batches] == [4] * 6
    firsts = np.concatenate([batch.tokens[:, 0] for batch in batches])
    want = [e.tokens[0] for e in EXAMPLES] + [0]
    np.testing.assert_array_equal(firsts, want)
    assert not batches[-1].segment_ids[-1].any()


def test_eval_hosts_and_preferences():
    pairs = [PreferenceExample(e, e) for e in EXAMPLES[:3]]
    how = {"batch_size": 2, "collate": collate_preferences, "shard_count": 2}
    parts = [list(eval_loader(pairs, shard_index=i, **how)) for i in range(2)]
    assert [len(part) for part in parts] == [2, 2]
    assert parts[0][1].rows.segment_ids.any()
    assert not parts[1][1].rows.segment_ids.any()


def test_two_lengths_at_most_wherever_it_starts():
    """A length of 16 saves work for one batch in two; 8 of them go on from step 12."""
    whole = [batch.tokens.shape for batch in loader(steps=20, batch_size=1)]
    assert set(whole) == {(1, 16), (1, 32)}
    resumed = loader(start_step=12, steps=20, batch_size=1)
    assert [batch.tokens.shape for batch in resumed] == whole[12:]
    assert {batch.tokens.shape for batch in eval_loader(batch_size=2)} == {(2, 32)}


def test_a_packed_batch_has_the_same_examples_in_fewer_rows():
    apart = list(loader(batch_size=12, steps=5))
    packed = list(loader(batch_size=12, steps=5, pack_rows=1))
    for a, b in zip(apart, packed, strict=True):
        assert b.tokens.size < 0.9 * a.tokens.size
        firsts = np.sort(b.tokens[(b.segment_ids > 0) & (b.positions == 0)])
        np.testing.assert_array_equal(firsts, np.sort(a.tokens[:, 0]))
        assert a.completion_mask.sum() == b.completion_mask.sum()
    resumed = list(loader(batch_size=12, start_step=3, steps=5, pack_rows=1))
    for a, b in zip(packed[3:], resumed, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_agree_on_the_number_of_packed_rows(hosts):
    long = [example(20 + 13 * i % 60, first=1000 * i) for i in range(64)]
    how = {"batch_size": 32, "seed": 1, "max_length": 256, "pack_rows": 8, "steps": 4}
    parts = [
        list(loader(long, shard_index=i, shard_count=hosts, **how))
        for i in range(hosts)
    ]
    assert len({batch.tokens.shape for batch in parts[0]}) <= 2
    for step in range(4):
        shapes = {part[step].tokens.shape for part in parts}
        assert len(shapes) == 1
        rows = hosts * shapes.pop()[0]
        assert rows % 8 == 0 and rows < 32
        starts = [p[step].tokens[p[step].positions == 0] for p in parts]
        starts = np.sort(np.concatenate(starts))
        places = batch_indices(64, 32, 1, step)
        want = np.sort([long[i].tokens[0] for i in places])
        np.testing.assert_array_equal(starts[starts >= 1000], want[want >= 1000])


def test_eval_packs_every_example_once():
    batches = eval_loader(batch_size=8, pack_rows=1)
    starts = [b.tokens[(b.segment_ids > 0) & (b.positions == 0)] for b in batches]
    want = [np.sort([e.tokens[0] for e in EXAMPLES[i : i + 8]]) for i in (0, 8, 16)]
    for found, firsts in zip(starts, want, strict=True):
        np.testing.assert_array_equal(np.sort(found), firsts)


@pytest.mark.parametrize("parts", [1, 4])
def test_packed_pairs_stay_together(parts):
    pairs = [PreferenceExample(e, e, float(i)) for i, e in enumerate(EXAMPLES)]
    how = {"batch_size": 23, "collate": collate_preferences, "pack_rows": parts}
    batch = next(loader(pairs, **how))
    assert batch.margins.shape == (parts, -(-23 // parts))
    assert batch.rows.tokens.size < 0.9 * 46 * 32
    for b, margins in enumerate(batch.margins):
        ids = batch.rows.segment_ids[b]
        for p, margin in enumerate(margins):
            for side in (1, 2):
                tokens = batch.rows.tokens[b][ids == 2 * p + side]
                want = EXAMPLES[int(margin)].tokens if margin or len(tokens) else []
                np.testing.assert_array_equal(tokens, want)
    assert np.sum(batch.rows.positions[batch.rows.segment_ids > 0] == 0) == 46


def test_no_examples_and_undividable_batches_are_errors():
    with pytest.raises(ValueError, match="no examples"):
        loader([])
    with pytest.raises(ValueError, match="batch_size=4 cannot be divided over 3"):
        loader(shard_count=3)
    with pytest.raises(ValueError, match="shard_index=2"):
        loader(shard_index=2, shard_count=2)
    with pytest.raises(ValueError, match="no examples"):
        batch_indices(0, 4, 0, 0)


def test_data_touches_no_device_and_imports_lazily():
    code = """
import sys, jalign.data as data, numpy as np
for name in ("datasets", "transformers", "grain"):
    assert name not in sys.modules, name
e = [data.Example(np.arange(3, dtype=np.int32), np.arange(3) > 0)] * 4
next(data.make_loader(e, batch_size=2, seed=0, collate=data.collate_tokens,
                      max_length=8))
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True)

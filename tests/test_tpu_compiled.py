"""Tests for jalign/plan/collectives.py and benchmarks/tpu_compiled.py; nothing is
compiled. tests/tpu_module.txt is cut out of what libtpu made of a DPO step."""

from pathlib import Path

import pytest

from benchmarks import tpu_compiled
from jalign.plan import collectives

TEXT = (Path(__file__).parent / "tpu_module.txt").read_text("utf-8")


def test_bytes_of_each_kind_with_the_runs_of_the_loops_around_it():
    found = [(x.kind, x.part, x.runs, x.bytes) for x in collectives.collectives(TEXT)]
    layers, steps = 3, 2  # a window's counter goes to 4 by 2
    assert found == [
        ("all-to-all", "embedding", 1, 2 * 8 * 2 * 512 * 64 * 7 / 8),
        ("collective-permute", "layers", 6, 2 * 64 * 1024 * layers * steps),
        # Carried on by a second fusion, and counted once.
        ("all-gather", "layers", 3, 2 * 512 * 2 * 128 * 7 / 8 * layers),
        # The side of the condition that computes.
        ("all-reduce", "unembedding", 1, 2 * 2 * 4 * 8 * 512 * 3 / 4),
        ("all-reduce", "rest", 1, 2 * 4 * 7 / 8),
        # An all-reduce of which each chip keeps half.
        ("reduce-scatter", "unembedding", 1, 4 * 256 * 2048),
    ]


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", 2),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}, d", 8),
        ("replica_groups=mesh['axis_0'=16,'axis_1'=1] {'axis_0':(1)4}, d", 4),
    ],
)
def test_the_size_of_a_group_in_each_form_of_the_text(groups, size):
    text = TEXT.replace("replica_groups=[1,8]<=[8], dimensions={0}", groups)
    first = collectives.collectives(text)[0]
    assert first.bytes == 2 * 8 * 2 * 512 * 64 * (size - 1) / size


def test_what_is_no_module_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives.collectives("HloModule")


def found_of(case, **changes):
    sent = collectives.collectives(TEXT)
    found = tpu_compiled.Found(case, 2**30, 2**31, 3 * 2**30, sent, 1e6, 1.0)
    return found._replace(**changes)


def test_rows_take_the_place_of_those_of_the_same_name():
    first, second, *_ = tpu_compiled.CASES
    page = f"above\n{tpu_compiled.BEGIN}\n{tpu_compiled.END}\nbelow\n"
    for case, size in ((second, 2**30), (first, 2**30), (second, 3 * 2**30)):
        row = tpu_compiled.row(found_of(case, arguments=size))
        assert len(row) == len(tpu_compiled.HEADER)
        page = tpu_compiled.written(page, [row])
    lines = page.splitlines()
    assert [lines[0], lines[-1]] == ["above", "below"]
    table = [[x.strip() for x in line.strip("|").split("|")] for line in lines[2:-2]]
    assert [row[0] for row in table[2:]] == [first.name, second.name]
    assert [row[2:5] for row in table[2:]] == [
        ["1.00", "2.00", "3.00"],
        ["3.00", "2.00", "3.00"],
    ]
    with pytest.raises(ValueError, match="between"):
        tpu_compiled.written("no markers", [])


def test_the_published_sizes_have_their_published_numbers_of_parameters():
    published = {"1b": 1_235_814_400, "8b": 8_030_261_248, "70b": 70_553_706_496}
    published["405b"] = 405_853_388_800
    for name, count in published.items():
        assert tpu_compiled.num_parameters(tpu_compiled.MODELS[name]) == count
    # 45.2 GB a chip and step of 16: twice gathered and once reduced, 15/16 of it.
    assert round(tpu_compiled.bound(published["8b"], 16) / 1e9, 1) == 45.2


def test_each_case_is_a_config_that_a_run_would_take():
    for case in tpu_compiled.CASES:
        assert tpu_compiled.config_of(case).batch_size == case.batch_size

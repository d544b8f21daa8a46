"""The search: what it promises, checked against single plans; and its command line."""

import shlex

import pytest

from jalign import cli, plan
from jalign.cli_options import parse
from jalign.plan.find import find

from .test_estimate import LARGE, TINY

RUN = dict(batch_size=64, max_length=4096, dtype="bfloat16")


def of(result, **settings):
    """The plan of what was found, or of a change of it."""
    compute = result.config.compute
    given = dict(
        topology=f"v5e:{'x'.join(map(str, result.machine.sides))}",
        mesh=result.config.mesh,
        remat=compute.remat,
        microbatches=compute.microbatches,
    )
    return plan.plan("sft", LARGE, **(RUN | given | settings))


def test_the_smallest_slice_fits_and_no_smaller_one_does():
    found = plan.plan("sft", LARGE, topology="v5e", find="smallest", **RUN)
    assert found.fits and found.machine.sides == (4, 4)
    assert of(found).total == found.total and of(found).speed == found.speed
    # Half of it, as lean as can be: a row at a time, cut as far as it goes.
    leanest = dict(topology="v5e:2x4", mesh="fsdp=8", remat=True, microbatches=8)
    assert not plan.plan("sft", LARGE, **RUN, **leanest).fits


@pytest.mark.parametrize(("rows", "length"), [(64, 4096), (16, 128)])
def test_the_fastest_is_the_best_of_those_that_fit(rows, length):
    run = {"batch_size": rows, "max_length": length}
    how = dict(topology="v5e:4x4", find="fastest", dtype="bfloat16")
    found = plan.plan("sft", LARGE, **how, **run)
    times = [one.speed.seconds for one in found.found]
    assert times == sorted(times) and found.speed == found.found[0].speed
    # With few tokens the weights are not worth gathering.
    assert (found.mesh["tensor"] > 1) == (length == 128)
    for mesh in ("fsdp=16", "fsdp=8,tensor=2", "data=2,fsdp=8", "data=4,fsdp=4"):
        for parts in {1, rows // 16}:
            for remat in (False, True):
                given = run | dict(mesh=mesh, microbatches=parts, remat=remat)
                other = of(found, **given)
                assert not other.fits or other.speed.seconds >= times[0]


def test_what_is_set_stays_and_what_is_learned_changes_only_by_leave():
    how = dict(topology="v5e:4x4", find="fastest")
    given = RUN | dict(mesh="tensor=2", microbatches=8, remat=True)
    found = plan.plan("sft", LARGE, **given, **how)
    assert all(p.mesh["tensor"] == 2 for p in found.found)
    assert all(p.config.compute.microbatches == 8 for p in found.found)
    assert found.config.optim.optimizer == "adamw"
    allowed = plan.plan(
        "sft", LARGE, topology="v5e", find="smallest", **RUN, allow="optimizer"
    )
    assert allowed.config.optim.optimizer == "adafactor"
    assert allowed.machine.num_devices < 16
    wide = plan.plan("sft", LARGE, **how, batch_size=64, allow="dtype")
    assert wide.config.compute.dtype == "bfloat16"
    narrow = plan.plan("sft", LARGE, topology="h100:8", find="fastest", batch_size=64)
    assert narrow.config.compute.dtype == "float32"


@pytest.mark.parametrize("recipe", ["dpo", "ppo"])
def test_the_command_starts_what_was_found(recipe):
    """Its words, as the command reads them, are the config of the plan."""
    given = dict(learning_rate=3e-6, seed=7, lora_rank=8, split="train[:9]")
    given |= {"resume": False}
    given |= {"stop_token_ids": (5, 6)} if recipe == "ppo" else {"beta": 0.3}
    how = dict(topology="v5p:2x2x1", find="fastest", batch_size=32)
    found = plan.plan(recipe, LARGE, **how, **given)
    jalign, command, *words = shlex.split(found.command)
    assert (jalign, command) == ("jalign", recipe)
    config, _ = parse(recipe, words, type(found.config).__mro__[2], cli.Launch)
    for part in ("mesh", "compute", "optim", "lora", "seed", "split", "resume"):
        assert getattr(config, part) == getattr(found.config, part)
    assert (config.model, config.data, config.out) == ("MODEL", "DATA", "OUT")
    if recipe == "ppo":
        assert config.reward == "REWARD_MODEL"
        assert config.options == found.config.options


@pytest.mark.parametrize(
    ("topology", "goal", "settings", "message"),
    [
        ("v5e:4x4", "smallest", {}, "--find smallest needs a kind of chip alone"),
        ("v5e", "fastest", {}, "--find fastest needs a slice, as v5e:4x4"),
        (None, "fastest", {}, "needs to know the memory of cpu: give --topology"),
        ("z80", "smallest", {}, "'z80' is not one of v2, "),
        ("v5e", "cheapest", {}, "'cheapest' is not one of smallest, fastest"),
        ("v5e:4x4", "fastest", {"batch_size": 3}, "nothing to try.*not a multiple"),
        ("v5e:2x2", "fastest", {}, "nothing fits.*4 x v5e with .*--allow"),
    ],
)
def test_what_cannot_be_found_is_told(topology, goal, settings, message):
    with pytest.raises(ValueError, match=message):
        plan.plan("sft", LARGE, topology=topology, find=goal, **(RUN | settings))


def test_leave_is_given_by_name_and_for_a_search():
    config = plan.SFTPlan(model="m")
    with pytest.raises(ValueError, match="allow 'seed'.*optimizer and dtype"):
        find(config, TINY, "v5e:2x2", "fastest", "seed")
    with pytest.raises(ValueError, match="allow is for find"):
        plan.SFTPlan(model="m", allow="dtype")

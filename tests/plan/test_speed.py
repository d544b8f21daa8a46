"""Seconds: by arithmetic, and of a module whose times can be worked out by hand."""

import dataclasses
import types

import jax
import pytest

from jalign import plan, sharding
from jalign.plan import speed
from jalign.plan.compiled import memory_of
from jalign.plan.module_seconds import speed_of_module
from jalign.plan.work import total
from jalign.sharding.machines import KINDS, chip_of, slices

from .test_estimate import LARGE, ON_16, TINY


@pytest.mark.parametrize(
    ("topology", "ways", "inner", "links"),
    [
        ("v5e:4x4", 16, False, 2),  # two lines: a side of 4 has no way around
        ("v5e:16x16", 256, False, 4),  # two rings
        ("v5e:16x16", 16, True, 2),
        ("v5e:4x4", 2, True, 1),
        ("v5p:4x4x4", 64, False, 6),
        ("v5p:2x2x4", 16, False, 3),  # no cube: lines
        ("tpu7x:4x4x4", 128, False, 3),  # 6 links, for the two devices of a chip
        ("h100:8", 8, False, 1),
    ],
)
def test_links_that_serve_a_collective(topology, ways, inner, links):
    machine = sharding.machine(topology)
    assert machine.bandwidth(ways, inner=inner) == links * machine.chip.link


def test_between_hosts_is_the_network_and_nothing_is_known_of_a_cpu():
    assert sharding.machine("h100:16").bandwidth(16) == 50e9
    with pytest.raises(ValueError, match="links of cpu"):
        sharding.machine().bandwidth(8)


def test_devices_are_known_by_their_names_and_slices_grow():
    names = {
        "v5e": "TPU v5 lite",
        "v5p": "TPU v5",
        "a100-80gb": "NVIDIA A100-SXM4-80GB",
    }
    assert all(chip_of(name) is KINDS[kind] for kind, name in names.items())
    assert chip_of("cpu") is None
    assert slices("v5e")[:4] == ["v5e:1x1", "v5e:2x2", "v5e:2x4", "v5e:4x4"]
    for kind in KINDS:
        sizes = [sharding.machine(one).num_devices for one in slices(kind)]
        assert sizes == sorted(sizes) and sizes[-1] >= 256
    with pytest.raises(ValueError, match="'z80' is not one of v2, "):
        slices("z80")


def test_parts_add_up_and_mean_the_mfu():
    found = plan.plan("sft", LARGE, **ON_16)
    parts = {part.name: part.amount for part in found.speed.parts}
    peak, work = 197e12, found.work
    products = total(work.flops[:1]) + total(work.again[:1])
    assert parts["products"] == pytest.approx(products / (0.85 * peak))
    states = 8.03e9 / 16 * (4 + 8 + 4)  # parameters, moments, gradients; both ways
    assert parts["optimizer"] == pytest.approx(2 * states / 8.1e11, rel=1e-3)
    assert found.speed.seconds == pytest.approx(sum(parts.values()))
    assert found.speed.mfu == total(work.flops) / found.speed.seconds / peak
    sent = total(part for part in work.sent if part.axis == "fsdp")
    assert total(found.speed.hidden) == pytest.approx(sent / (2 * 4.5e10))


def test_few_tokens_cannot_hide_the_weights_and_nothing_hides_tensor():
    short = plan.plan("sft", LARGE, **(ON_16 | {"max_length": 128})).speed
    parts = {part.name: part.amount for part in short.parts}
    assert parts["collectives, not hidden"] > parts["products"]
    cut = plan.plan("sft", LARGE, **(ON_16 | {"mesh": "fsdp=4,tensor=4"}))
    of_tensor = sum(p.amount for p in cut.work.sent if p.axis == "tensor")
    parts = {part.name: part.amount for part in cut.speed.parts}
    assert parts["collectives of tensor"] == pytest.approx(of_tensor / 4.5e10)


def test_float32_is_half_as_fast_on_a_gpu_and_a_cpu_has_no_time():
    half, whole = (
        plan.plan("sft", LARGE, topology="h100:8", dtype=dtype).speed
        for dtype in ("bfloat16", "float32")
    )
    assert whole.parts[0].amount == pytest.approx(2 * half.parts[0].amount)
    assert any("TF32" in sentence for sentence in whole.assumptions)
    here = plan.plan("sft", TINY)
    assert here.speed is None and "takes" not in str(here)


def test_an_estimate_says_how_far_off_it_was():
    assert "off by +5% (docs" in speed.trust("v5e", False)
    assert "off by +31%, more than 25% (docs" in speed.trust("v5e", True)
    unheld = "were never held against a run on"
    assert f"a compiled module {unheld} v5p" in speed.trust("v5p", True)
    assert f"by arithmetic {unheld} b200" in speed.trust("b200", False)
    found = plan.plan("sft", LARGE, **ON_16)
    near = dataclasses.replace(found, compiled_speed=found.speed)
    assert "by arithmetic" not in str(near).partition("are estimates")[2]
    (first, *rest), hidden, *others = found.speed
    slow = speed.Speed((first._replace(amount=9.0), *rest), hidden, *others)
    far = dataclasses.replace(found, compiled_speed=slow)
    assert "by arithmetic it is -" in str(far)


# "32B" of maxtext's configs/tpu: global_parameter_scale 32.
_32B = dict(hidden_size=8192, intermediate_size=28672, num_attention_heads=64)
_32B |= dict(model_type="llama", vocab_size=32000, num_hidden_layers=32)
RUNS = {
    "v5e": (_32B, "v5e:16x16", "fsdp=256", 1024, 2048, True, 12.1),
    "v5p": (_32B, "v5p:4x4x4", "fsdp=16,tensor=4", 384, 2048, False, 7.3),
    "v6e": ("llama-3.1-8b", "v6e:2x4", None, 24, 8192, True, 3.443),
    "tpu7x": ("llama-3.1-70b", "tpu7x:4x4x4", None, 256, 8192, True, 12.20),
    "h100": ("llama-3.2-1b", "h100:1", None, 8, 2048, False, 0.289),
}


@pytest.mark.parametrize("kind", speed.HELD)
def test_how_far_off_is_what_comes_out(kind):
    model, topology, mesh, rows, length, remat, seconds = RUNS[kind]
    how = dict(topology=topology, mesh=mesh, batch_size=rows, max_length=length)
    found = plan.plan("sft", model, **how, remat=remat, dtype="bfloat16")
    off = found.speed.seconds / seconds - 1
    assert off == pytest.approx(speed.HELD[kind].arithmetic, abs=0.01)


# 1.5 cycles a nanosecond; 16 chips as 4x4 exchange over two lines, 90 bytes a ns.
MODULE = """
%begun (p: bf16[1]) -> bf16[16] {
  ROOT %g = bf16[480000]{0} all-gather(%p), channel_id=7, replica_groups=[1,16]<=[16]
}
%carried (p: bf16[1]) -> bf16[16] {
  ROOT %g2 = bf16[480000]{0} all-gather(%p), channel_id=7, replica_groups=[1,16]<=[16]
}
%body (t: (s32[])) -> (s32[]) {
  %one = s32[] constant(1)
  %i = s32[] get-tuple-element(%t), index=0
  %f = f32[8]{0} fusion(%i), calls=%x, backend_config={"estimated_cycles":"1500"}
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[]) tuple(%next)
}
%cond (t: (s32[])) -> pred[] {
  %three = s32[] constant(3)
  %j = s32[] get-tuple-element(%t), index=0
  ROOT %lt = pred[] compare(%j, %three), direction=LT
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[]) while(%a), condition=%cond, body=%body
  %s = (f32[8]{0}, f32[810000]{0}, u32[]) copy-start(%a)
  %b = bf16[16]{0} fusion(%a), kind=kCustom, calls=%begun
  %c = f32[8]{0} fusion(%b), calls=%carried, backend_config={"estimated_cycles":"6000"}
  %d = f32[810000]{0} copy-done(%s)
  %r = f32[900000]{0} all-reduce(%c), channel_id=8, replica_groups=[1,16]<=[16]
  %splash_mha_fwd.1 = bf16[2,4,512,64]{3,2,1,0} custom-call(%r), \
custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,4]{1,0}, \
bf16[2,4,512,64]{3,2,1,0}, bf16[2,2,512,64]{3,2,1,0}, s32[2,512,128]{2,1,0}}
}
"""


def test_a_module_takes_what_its_schedule_says():
    found = plan.plan("sft", LARGE, **ON_16)
    result = speed_of_module(MODULE, found.work, found.machine)
    parts = {part.name: part.amount for part in result.parts}
    assert parts["fusions"] == pytest.approx((3 * 1500 + 6000) / 1.5e9)
    gather = 2 * 480_000 * 15 / 16 / 90e9  # 10 us, of which 4 are hidden
    reduce = 2 * 4 * 900_000 * 15 / 16 / 90e9
    assert parts["collectives"] == pytest.approx(gather - 4e-6 + reduce)
    assert total(result.hidden) == pytest.approx(4e-6)
    assert "copies" not in parts  # 4 us, hidden by the collective
    flops = 2 * 2 * (2 * 4 * 512 * 512 / 2) * 128
    assert parts["attention"] == pytest.approx(flops / (0.5 * 197e12))
    assert result.mfu == total(found.work.flops) / result.seconds / 197e12


def test_a_module_of_one_device_sends_nothing():
    found = plan.plan("sft", LARGE, topology="v5e:1x1", batch_size=1)
    text = MODULE.replace("all-gather(", "copy(").replace("all-reduce(", "copy(")
    result = speed_of_module(text, found.work, found.machine)
    assert {part.name for part in result.parts} == {"fusions", "attention"}
    assert result.hidden == ()


def test_a_module_without_cycles_tells_no_time():
    found = plan.plan("sft", LARGE, **ON_16)
    assert speed_of_module("ENTRY %m {\n}", found.work, found.machine) is None
    here = plan.plan("sft", TINY)
    assert speed_of_module(MODULE, here.work, here.machine) is None


class Compiled:
    """Stands for a jax.stages.Compiled."""

    peak = 3 * 2**29

    def as_text(self):
        return MODULE

    def memory_analysis(self):
        sizes = ["argument", "output", "alias", "temp"]
        memory = {f"{name}_size_in_bytes": 2**30 for name in sizes}
        memory |= {"peak_memory_in_bytes": self.peak}
        return types.SimpleNamespace(**memory, generated_code_size_in_bytes=0)


def test_a_compiled_step_tells_its_memory_its_traffic_and_its_time(monkeypatch):
    monkeypatch.setattr("jalign.plan.compiled.compiled_step", lambda *_: Compiled())
    monkeypatch.setattr("jalign.sharding.topology_devices", lambda _: jax.devices())
    given = ON_16 | {"topology": "v5e:2x4", "mesh": "fsdp=8"}
    found = plan.plan("sft", LARGE, **given, compile=True)
    assert found.peak == 3 * 2**29 and found.fits
    sent = {part.name: part.amount for part in found.compiled_sent}
    sizes = {"all-gather": 960_000, "all-reduce": 2 * 3_600_000}
    assert sent == {kind: size * 15 / 16 for kind, size in sizes.items()}
    assert found.compiled_speed is not None
    text = str(found)
    assert "as compiled" in text and "of the compiled step" in text
    assert "by arithmetic it is" in text  # the module above does nearly nothing
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("peak", [0, 2**29, 3 * 2**30])
def test_temporaries_are_all_where_the_compiler_tells_no_peak(peak):
    compiled = Compiled()
    compiled.peak = peak
    rows = {row.name: row.bytes for row in memory_of(compiled)}
    assert rows["temporaries"] == 2**30

"""How long an update takes: an estimate by a model that it states.

By arithmetic, from the FLOPs and bytes of work.py; or from the compiled module
(module_seconds.py), which knows what the compiler made of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

from jalign.plan.work import ATTENTION, Part, Work, total
from jalign.sharding import Machine
from jalign.sharding.machines import BETWEEN_SLICES

# Of a chip's peak that products with weights reach, by the published runs of
# docs/scale.md; and XLA's on an H100, docs/performance.md.
PRODUCTS = {"v6e": 0.65, "tpu7x": 0.65}
ON_TPU, ON_GPU = 0.85, 0.67
KERNELS = 0.5  # of peak, that attention kernels reach


class Held(NamedTuple):
    """A run on a kind of machine, and how far an estimate of it is off.

    Attributes:
      run: in words.
      arithmetic, compiled: estimate over published time of a step, less 1; None where
        it was not made.
    """

    run: str
    arithmetic: float
    compiled: float | None = None


# docs/scale.md has the runs, their sources and what is not alike.
HELD = {
    "v5e": Held("MaxText's 32B on 256 chips", 0.05, 0.31),
    "v5p": Held("MaxText's 32B on 64 chips", -0.03),
    "v6e": Held("MaxText's 8B on 8 chips, which offloads", -0.11, 0.44),
    "tpu7x": Held("MaxText's 70B on 64 chips, which recomputes less", 0.13),
    "h100": Held("jalign's own SFT of 1.2B on one device", -0.27),
}
FAR_OFF = 0.25


class Speed(NamedTuple):
    """Of an update, on each device.

    Attributes:
      parts: seconds, which add up.
      hidden: seconds of what goes on meanwhile.
      mfu: share of the devices' peak that the FLOPs of `Work.flops` use; None where the
        peak is not known.
      assumptions: sentences.
    """

    parts: tuple[Part, ...]
    hidden: tuple[Part, ...]
    mfu: float
    assumptions: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Of the update."""
        return total(self.parts)


def speed_of(
    work: Work,
    machine: Machine,
    parts: Sequence[Part],
    hidden: Sequence[Part],
    assumptions: Sequence[str],
    *,
    compiled: bool = False,
) -> Speed:
    """These parts, with the MFU that they mean and how far to trust them."""
    seconds, chip = total(parts), machine.chip
    assert chip is not None
    words = (*assumptions, trust(machine.kind, compiled))
    mfu = total(work.flops) / seconds / chip.flops
    return Speed(tuple(parts), tuple(hidden), mfu, words)


def roofline(
    work: Work, machine: Machine, mesh: dict[str, int], written: int, dtype: str
) -> Speed | None:
    """By arithmetic.

    Args:
      work: of the update.
      machine: where it runs; None comes back where its speed is not known.
      mesh: axis name -> size.
      written: bytes of parameters, moments and gradients on a device: the optimizer
        reads and writes them.
      dtype: of the products.
    """
    chip = machine.chip
    if chip is None:
        return None
    share = products_share(machine) / (1 if chip.torus or dtype == "bfloat16" else 2)
    products, kernels = products_and_kernels(work)
    busy = [
        Part("products", products / (share * chip.flops), _percent(share)),
        Part("attention", kernels / (KERNELS * chip.flops), _percent(KERNELS)),
    ]
    moved = {axis: 0.0 for axis in mesh}
    for part in work.sent:
        moved[part.axis] += part.amount
    inner = "context", "tensor"
    along = {x: machine.bandwidth(mesh[x], inner=x in inner) for x in mesh}
    if machine.slices > 1:
        along["data"] = BETWEEN_SLICES
    hidable = moved["fsdp"] / along["fsdp"] + moved["data"] / along["data"]
    left = max(0.0, hidable - total(busy))
    seen = sum(moved[axis] / along[axis] for axis in inner)
    parts = [
        *busy,
        Part("optimizer", 2 * written / chip.hbm, "reads and writes its state"),
        Part("collectives, not hidden", left, "of fsdp and data"),
        Part("collectives of tensor", seen, "and context: nothing hides them"),
    ]
    words = [
        f"products at {share:.0%} and attention at {KERNELS:.0%} of "
        f"{chip.flops / 1e12:g} TFLOP/s; memory at {chip.hbm / 1e9:,.0f} GB/s",
        "all rows are max_length long and all their logits are computed",
    ]
    if dtype == "float32":
        how = (
            "as bfloat16, the TPU's default" if chip.torus else "as TF32, half as fast"
        )
        words.append(f"products of float32 are computed {how}")
    if total(work.sent):
        shown = {axis: along[axis] for axis in mesh if moved[axis]}
        rates = ", ".join(f"{axis} {x / 1e9:.0f}" for axis, x in shown.items())
        words.append(f"a device sends so many GB/s, one way: {rates}")
        words.append("arithmetic hides the collectives of fsdp and data, not tensor's")
    return speed_of(
        work,
        machine,
        [part for part in parts if part.amount],
        [Part("collectives", hidable - left, "of fsdp and data")] if hidable else [],
        words,
    )


def products_share(machine: Machine) -> float:
    """Of the peak, that products with weights are taken to reach."""
    usual = ON_TPU if machine.chip and machine.chip.torus else ON_GPU
    return PRODUCTS.get(machine.kind, usual)


def products_and_kernels(work: Work) -> tuple[float, float]:
    """FLOPs of products with weights, and of attention, what is done twice included."""
    every = (*work.flops, *work.again)
    kernels = total(part for part in every if part.name == ATTENTION)
    return total(every) - kernels, kernels


def trust(kind: str, compiled: bool) -> str:
    """How far estimates for a kind of machine were off."""
    held = HELD.get(kind)
    off = held and (held.compiled if compiled else held.arithmetic)
    if held is None or off is None:
        how = "from a compiled module" if compiled else "by arithmetic"
        return (
            f"times {how} were never held against a run on {kind}: they may be off by "
            f"more than {FAR_OFF:.0%}"
        )
    far = f", more than {FAR_OFF:.0%}" if abs(off) > FAR_OFF else ""
    return f"{held.run}: it was off by {off:+.0%}{far} (docs/scale.md)"


def _percent(share: float) -> str:
    return f"at {share:.0%} of peak"

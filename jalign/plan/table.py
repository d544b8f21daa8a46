"""What a plan is asked and what it answers; how it reads as text."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from jalign.sharding import Machine

GIB = 2**30
_USABLE = 0.92  # the rest goes to the runtime, to programs and to fragmentation


@dataclass(frozen=True)
class PlanConfig:
    """A run whose memory is to be planned; settings as in the training commands."""

    model: str
    """Directory or hub id (its config.json is enough), or the path of a config.json."""
    recipe: Literal["sft", "reward", "dpo", "ppo", "grpo"] = "sft"
    """The training command."""
    topology: str | None = None
    """Machine, as v5e:4x4, v5p:4x4x4 or h100:8; unset means the devices here."""
    mesh: str = ""
    """Mesh axes, as "fsdp=8,tensor=2"."""
    batch_size: int = 8
    """Rows (reward, dpo: pairs; ppo, grpo: completions) over all devices."""
    max_length: int = 2048
    """Tokens of a row; for ppo and grpo prompt + completion."""
    microbatches: int = 1
    """Parts that each update is cut into."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of activations and products; parameters and moments are float32."""
    remat: bool = True
    """Compute the inside of a layer again in the backward pass."""
    optimizer: Literal["adamw", "adam", "adafactor", "muon"] = "adamw"
    """Its moments take memory, too."""
    shared_trunk: bool = False
    """For ppo: the critic is a head of the policy."""
    compile: bool = False
    """Also compile the real step, for the TPU topology or for the devices here."""

    def __post_init__(self):
        for name in ("batch_size", "max_length", "microbatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.batch_size % self.microbatches:
            raise ValueError(
                f"microbatches {self.microbatches} does not divide batch_size "
                f"{self.batch_size}"
            )
        if self.shared_trunk and self.recipe != "ppo":
            raise ValueError(f"shared_trunk is for ppo: {self.recipe} has no critic")

    @property
    def online(self) -> bool:
        """Whether the policy samples what it learns from, beside other models."""
        return self.recipe in ("ppo", "grpo")


class Row(NamedTuple):
    """One line of the table: bytes on each device, and what they are."""

    name: str
    bytes: int
    note: str


@dataclass(frozen=True)
class Plan:
    """The memory of one device.

    Attributes:
      config: what was asked.
      machine: where it runs.
      mesh: axis name -> size.
      num_parameters: of the trained policy (or reward model).
      resident: rows of what stays for the whole run.
      transient: phase -> rows of what lives within it; phases take turns.
      compiled: the compiler's own rows for the training step, if asked for.
      advice: what to change; empty where it fits.
    """

    config: PlanConfig
    machine: Machine
    mesh: dict[str, int]
    num_parameters: int
    resident: tuple[Row, ...]
    transient: dict[str, tuple[Row, ...]]
    compiled: tuple[Row, ...] = ()
    advice: str = ""

    @property
    def total(self) -> int:
        """Estimated peak in bytes on each device."""
        phases = (sum(row.bytes for row in rows) for rows in self.transient.values())
        return sum(row.bytes for row in self.resident) + max(phases, default=0)

    @property
    def peak(self) -> int:
        """Bytes to count on: the compiler's, which knows more, where it was asked.

        It sees one training step; PPO and GRPO keep other models beside it, so there
        the larger of both counts.
        """
        compiled = sum(row.bytes for row in self.compiled)
        return max(compiled, self.total if self._partly_compiled else 0)

    @property
    def _partly_compiled(self) -> bool:
        return not self.compiled or self.config.online

    @property
    def fits(self) -> bool | None:
        """Whether the peak fits into a device; None where its memory is unknown."""
        if self.machine.device_bytes is None:
            return None
        return self.peak <= _USABLE * self.machine.device_bytes

    def __str__(self) -> str:
        return _table(self)


def _table(p: Plan) -> str:
    c = p.config
    mesh = ", ".join(f"{name}={size}" for name, size in p.mesh.items())
    lines = [
        f"{c.recipe} of {c.model}: {p.num_parameters / 1e9:.3g} B parameters",
        f"on {p.machine.num_devices} x {p.machine.kind}, mesh {mesh}",
        f"{c.batch_size} x {c.max_length} tokens in {c.microbatches} micro-batch(es), "
        f"{c.dtype}, {'remat' if c.remat else 'no remat'}, {c.optimizer}",
        "",
        f"{'on each device':<28}{'GiB':>9}",
    ]
    lines += [_line(row) for row in p.resident]
    for phase, rows in p.transient.items():
        lines += [f"  during {phase}", *(_line(row) for row in rows)]
    lines += [_line(Row("peak (estimate)", p.total, ""))]
    if p.compiled:
        lines += ["", "the compiler's own account of the training step"]
        lines += [_line(row) for row in p.compiled]
        lines += [_line(Row("peak (compiled)", sum(r.bytes for r in p.compiled), ""))]
    verdict = {True: "fits", False: "does NOT fit", None: "capacity unknown"}[p.fits]
    size = p.machine.device_bytes
    room = f" in {size / GIB:.0f} GiB ({_USABLE:.0%} usable)" if size else ""
    return "\n".join(
        [*lines, "", f"{verdict}{room}", *([p.advice] if p.advice else [])]
    )


def _line(row: Row) -> str:
    return f"  {row.name:<26}{row.bytes / GIB:9.3f}  {row.note}".rstrip()

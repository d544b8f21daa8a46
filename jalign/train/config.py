"""What a user picks for a run: what all recipes share, and SFT, reward models and DPO.

Frozen dataclasses, flat in use; bounds stand beside the defaults. A contradiction
raises ValueError here, naming the fields; nothing is rewritten.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from jalign.data.columns import parse_columns
from jalign.data.sources import Source
from jalign.models.lora import LoraConfig
from jalign.settings import Checked, check, nearest, number
from jalign.train.loss_spec import Term, parse_losses
from jalign.train.loss_table import REGISTRY


@dataclass(frozen=True, kw_only=True)
class DataOptions(Checked):
    """Which rows of its `data` a run trains on, and which it holds out."""

    split: str | None = None
    """Split of `data` to train on; unset takes train, or what has no splits whole."""
    eval_data: Source | None = None
    """Held-out rows, measured before and after training."""
    eval_split: str | None = None
    """Their split, of `data` if `eval_data` is unset; unset takes test or validation,
    and never train."""
    columns: str | None = None
    """Names of columns, such as "prompt=question,completion=answer,ignore=label";
    the usual ones (prompt, completion, chosen, rejected, messages, text, ...) need
    none."""
    bad_rows: Literal["error", "skip"] = "error"
    """What to do with rows that cannot be used: stop, or count and leave out."""

    def __post_init__(self):
        super().__post_init__()
        parse_columns(self.columns)

    @property
    def holds_out(self) -> bool:
        """Whether there are held-out rows."""
        return self.eval_data is not None or self.eval_split is not None


@dataclass(frozen=True)
class OptimConfig(Checked):
    """Optimizer and learning-rate schedule."""

    learning_rate: float = number(1e-5, ">= 0")
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the learning rate falls after the warm-up."""
    warmup_steps: int = number(0, ">= 0")
    """Steps of linear rise to the peak."""
    end_fraction: float = number(0.0, ">= 0", "<= 1")
    """Share of the peak that linear and cosine end with."""
    optimizer: Literal["adamw", "adam", "adafactor", "muon"] = "adamw"
    """muon takes the matrices inside the layers; its other parameters go by Adam."""
    weight_decay: float = number(0.0, ">= 0")
    """Decoupled decay of the matrices (not of norms and biases), times the rate."""
    b1: float = number(0.9, ">= 0", "< 1")
    """Share of Adam's mean of the gradients that stays at each step."""
    b2: float = number(0.999, ">= 0", "< 1")
    """The same of its mean of their squares."""
    # At 0, Adam divides 0 by 0 where a parameter has had no gradient yet.
    eps: float = number(1e-8, "> 0")
    """Added to the root of that mean, which divides."""
    max_grad_norm: float = number(1.0, ">= 0")
    """Clip the global gradient norm to this; 0 clips nothing."""

    def __post_init__(self):
        super().__post_init__()
        check(
            not (self.schedule == "constant" and self.end_fraction),
            "schedule 'constant' does not fall: end_fraction "
            f"{self.end_fraction} needs schedule 'linear' or 'cosine'",
        )
        check(
            not (self.optimizer == "adam" and self.weight_decay),
            f"optimizer 'adam' has no weight_decay (got {self.weight_decay}); "
            "use optimizer 'adamw'",
        )


@dataclass(frozen=True)
class ComputeOptions(Checked):
    """Memory against time: none of these changes what is computed, but for bfloat16."""

    microbatches: int = number(1, ">= 1")
    """Parts each update is cut into; their gradients are added."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products; parameters and losses are float32 always."""
    remat: bool = False
    """Recompute activations in the backward pass instead of keeping them."""


@dataclass(frozen=True)
class LoraOptions(Checked):
    """Low-rank adapters are trained beside the frozen model, in place of all of it."""

    lora_rank: int | None = number(None, ">= 1")
    """Rank of the adapters; unset trains the whole model, or, where `model` is a
    folder with adapters, goes on with those."""
    lora_alpha: float = number(32.0, "> 0")
    """Adapters are scaled by lora_alpha / lora_rank."""
    lora_targets: str = "all"
    """Linear layers that have one: all, attention, mlp, or ends of names (or regexes)
    such as "q_proj,v_proj"."""
    lora_dropout: float = number(0.0, ">= 0", "< 1")
    """Share of the adapters' inputs that is set to 0 while training."""
    lora_rank_pattern: str | None = None
    """Other ranks, by the end of a layer's name: "down_proj=8,layers.0.*=4"; 0 for
    none."""
    lora_alpha_pattern: str | None = None
    """Other alphas, likewise."""
    lora_train: str | None = None
    """What is trained in full beside them: embed, head, or both; the head of a reward
    model or critic always is."""
    rslora: bool = False
    """Scale by lora_alpha / sqrt(lora_rank) instead (arXiv:2312.03732)."""
    quantize: Literal["nf4", "int8"] | None = None
    """Hold the frozen layers in 4 or 8 bits a weight (QLoRA, arXiv:2305.14314)."""

    def __post_init__(self):
        super().__post_init__()
        self.lora()
        # These may be for adapters that the model has already.
        open_ = ("lora_rank", "lora_dropout", "quantize")
        alone = [f for f in fields(self) if f.name not in open_]
        given = [f.name for f in alone if getattr(self, f.name) != f.default]
        check(
            self.lora_rank is not None or not given,
            f"{', '.join(given)}: this is of new adapters; set lora_rank, too",
        )

    def lora(self) -> LoraConfig | None:
        """What `models.lora.init` takes; None without lora_rank."""
        if self.lora_rank is None:
            return None
        return LoraConfig(
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            targets=_names(self.lora_targets),
            rank_pattern=_pattern("rank", self.lora_rank_pattern, int),
            alpha_pattern=_pattern("alpha", self.lora_alpha_pattern, float),
            rank_stabilized=self.rslora,
            train_full=_names(self.lora_train or ""),
        )


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, text.split(","))))


def _pattern(of: str, text: str | None, kind: Any) -> tuple[tuple[str, Any], ...]:
    """ "a=1,b=2" -> (("a", 1), ("b", 2))."""
    pairs = []
    for part in _names(text or ""):
        key, _, value = part.rpartition("=")
        try:
            pairs.append((key, kind(value)))
        except ValueError:
            key = ""
        check(bool(key), f"lora_{of}_pattern: {part!r} is not as NAME=8")
    return tuple(pairs)


@dataclass(frozen=True, kw_only=True)
class RunConfig(DataOptions):
    """The fields of every run; a subclass adds its recipe's own."""

    model: str
    """Model to train: a directory in HF format or a hub id; or one of adapters, which
    are trained on."""
    data: Source
    """Training rows: a file, a directory or a hub id; "SOURCE[NAME]" names a split."""
    out: str
    """Directory for model/, checkpoints/, metrics.jsonl and report.html. It, and all
    that is read, may be a URL (gs://, s3://)."""
    base: str | None = None
    """Of adapters in `model`: what they stand on; unset takes what they name."""
    steps: int | None = number(None, ">= 1")
    """Optimizer steps; overrides epochs."""
    epochs: float = number(1.0, "> 0")
    """Passes over the data, when steps is unset."""
    batch_size: int = number(8, ">= 1")
    """Rows (pairs) of a step, over all devices."""
    max_length: int = number(1024, ">= 2")
    """Longest row in tokens; what is longer loses its end."""
    seed: int = number(0, ">= 0", f"< {2**32}")
    """Of the order of the rows, fresh parameters and sampling."""
    mesh: str | None = None
    """Such as "fsdp=8,tensor=2", or "fsdp=8,context=8" for rows of very many tokens;
    unset puts all devices on fsdp."""
    eval_every: int | None = number(None, ">= 1")
    """Steps between held-out measurements; unset measures before and after only."""
    keep_best: str | None = None
    """A held-out figure, such as loss, accuracy or reward: OUT/model is then the
    checkpoint that was best by it, of those measured."""
    patience: int | None = number(None, ">= 1")
    """The run ends after so many measurements without a better one of keep_best."""
    checkpoint_every: int = number(100, ">= 0")
    """Steps between checkpoints; 0 saves only at the end."""
    resume: bool = True
    """Continue from the newest good checkpoint in OUT."""
    reschedule: bool = False
    """Continue with another number of steps, although the learning rate depends on it:
    what is left of the run follows the new schedule."""
    router_aux_coef: float = number(0.0, ">= 0")
    """Weight of the loss that keeps a mixture's experts equally busy."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraOptions = field(default_factory=LoraOptions)
    compute: ComputeOptions = field(default_factory=ComputeOptions)

    def __post_init__(self):
        super().__post_init__()
        check(
            self.lora.lora_rank is None or self.optim.optimizer != "muon",
            "optimizer muon is for whole matrices: adapters need another one",
        )
        check(
            self.holds_out or self.eval_every is None,
            "eval_every needs held-out rows: eval_data or eval_split",
        )
        check(
            self.keep_best is None or self.eval_every is not None,
            "keep_best chooses among measurements: set eval_every, too",
        )
        check(
            self.patience is None or self.keep_best is not None,
            "patience waits for a better keep_best: set it, too",
        )
        best, known = self.keep_best, self.figures
        check(
            best is None or best in known,
            f"keep_best {best!r} is not one of {', '.join(known)}"
            f"{nearest(best or '', known)}",
        )

    @property
    def figures(self) -> tuple[str, ...]:
        """Held-out figures that keep_best may name, by default those of pairs; the
        first is watched anyway."""
        return "accuracy", "log_loss", "margin"

    @property
    def watched(self) -> str:
        """The held-out figure by which the model is judged."""
        return self.keep_best or self.figures[0]


@dataclass(frozen=True, kw_only=True)
class OfflineConfig(RunConfig):
    """What the runs on given rows check together."""

    def __post_init__(self):
        super().__post_init__()
        warmup, parts = self.optim.warmup_steps, self.compute.microbatches
        check(
            self.steps is None or warmup < self.steps,
            f"warmup_steps {warmup} must be less than steps {self.steps}",
        )
        check(
            self.batch_size % parts == 0,
            f"microbatches {parts} does not divide batch_size {self.batch_size}",
        )


@dataclass(frozen=True)
class SFTOptions(Checked):
    """What is particular to supervised fine-tuning."""

    packing: bool = False
    """Put several short rows behind each other into rows of max_length."""
    assistant_only: bool | None = None
    """Train only the assistant's turns; unset does so for conversations."""
    completion_only: bool | None = None
    """Train only the completion; unset does so for prompt + completion rows."""
    loss: str = "sft"
    """A loss, or a sum such as "sft:z_loss=1e-4 + 0.5*dft"."""
    label_smoothing: float = 0.0
    """Weight of the uniform distribution in the target."""
    z_loss: float = 0.0
    """Weight of log(Z)^2, which keeps the logits' scale down."""

    def __post_init__(self):
        super().__post_init__()
        self.terms()

    def terms(self) -> dict[str, Term]:
        """The losses to sum, with the flags as their options."""
        smoothing, z_loss = self.label_smoothing or None, self.z_loss or None
        return parse_terms("sft", self.loss, label_smoothing=smoothing, z_loss=z_loss)


@dataclass(frozen=True)
class RewardOptions(Checked):
    """What is particular to reward models."""

    loss: str = "bradley_terry"
    """A loss, or a sum such as "bradley_terry + 0.01*center"."""
    center_coef: float = number(0.0, ">= 0")
    """Weight of (chosen + rejected)^2, which holds rewards near 0; try 0.01."""

    def __post_init__(self):
        super().__post_init__()
        check(
            "center" not in self.terms() or not self.center_coef,
            "center is in --loss already: drop --center-coef",
        )

    def terms(self) -> dict[str, Term]:
        """The losses to sum."""
        return parse_terms("reward", self.loss)


@dataclass(frozen=True)
class DPOOptions(Checked):
    """What is particular to direct preference optimization."""

    loss: str = "dpo"
    """A loss, or a sum such as "dpo:beta=0.1 + 0.2*sft"."""
    beta: float | None = None
    """Strength of the implicit KL penalty; unset takes each loss's own, dpo's 0.1."""
    label_smoothing: float = 0.0
    """Assumed share of flipped preferences, in [0, 0.5)."""

    def __post_init__(self):
        super().__post_init__()
        self.terms()

    def terms(self) -> dict[str, Term]:
        """The losses to sum, with the flags as their options."""
        smoothing = self.label_smoothing or None
        return parse_terms("dpo", self.loss, beta=self.beta, label_smoothing=smoothing)

    @property
    def reward_beta(self) -> float:
        """The scale of the implicit rewards in metrics: the first loss's beta."""
        options = (term.settings.get("beta") for term in self.terms().values())
        return next((beta for beta in options if beta is not None), 0.1)


@dataclass(frozen=True, kw_only=True)
class SFTConfig(OfflineConfig):
    """Supervised fine-tuning of a causal language model."""

    sft: SFTOptions = field(default_factory=SFTOptions)

    @property
    def figures(self) -> tuple[str, ...]:
        """What keep_best may name."""
        return "loss", "perplexity"


@dataclass(frozen=True, kw_only=True)
class RewardConfig(OfflineConfig):
    """A reward model from preference pairs, by the Bradley-Terry model."""

    reward: RewardOptions = field(default_factory=RewardOptions)


@dataclass(frozen=True, kw_only=True)
class DPOConfig(OfflineConfig):
    """Direct preference optimization; the model itself is the reference."""

    dpo: DPOOptions = field(default_factory=DPOOptions)

    def __post_init__(self):
        super().__post_init__()
        parts = self.compute.microbatches
        for name, term in self.dpo.terms().items():
            check(
                not term.entry.whole_batch or parts == 1,
                f"loss {name!r} compares the rows of the whole batch: microbatches "
                f"must be 1, got {parts}",
            )


def parse_terms(command: str, text: str, **flags: float | None) -> dict[str, Term]:
    """The terms of a command's --loss, with options from flags or from the text.

    Raises: ValueError as parse_losses.
    """
    return parse_losses(text, REGISTRY[command], flags)

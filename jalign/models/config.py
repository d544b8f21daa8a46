"""What a decoder is: sizes and switches; hashable, so it can be static in a jit."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

ROPE_KINDS = ("linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pretrained length.

    Attributes:
      kind: "linear" (Chen et al. 2023, arXiv:2306.15595), "llama3" (Llama 3.1), "yarn"
        (Peng et al. 2023, arXiv:2309.00071) or "longrope" (Ding et al. 2024,
        arXiv:2402.13753).
      factor: the new length over the old one.
      original_max_position: the pretrained length, tokens; all but linear.
      low_freq_factor, high_freq_factor: llama3's band, in turns over that length.
      beta_fast, beta_slow: yarn's band, in turns over that length.
      attention_factor: yarn's and longrope's factor on cos and sin; None computes it
        from `factor`.
      mscale, mscale_all_dim: yarn as DeepSeek has it; used when both are set.
      truncate: yarn rounds its band outwards to whole dimensions.
      short_factors, long_factors: longrope's divisor of each frequency, in documents of
        at most original_max_position tokens, and in longer ones.
    """

    kind: str
    factor: float
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"rope scaling {self.kind!r} is not one of {ROPE_KINDS}")
        if self.factor <= 0:
            raise ValueError(f"rope scaling factor {self.factor} is not positive")
        if self.kind != "linear" and self.original_max_position <= 0:
            raise ValueError(f"{self.kind} rope scaling needs original_max_position")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"rope scaling: low_freq_factor={self.low_freq_factor} is not below "
                f"high_freq_factor={self.high_freq_factor}"
            )


class LayerKind(NamedTuple):
    """What may differ from layer to layer.

    Attributes:
      window: a token sees itself and the window - 1 tokens before it; None: all.
      rope: "main", "local" (its base is ModelConfig.local_rope_theta) or "none".
    """

    window: int | None = None
    rope: str = "main"


class Experts(NamedTuple):
    """A mixture of experts in the place of each MLP (models.experts).

    Attributes:
      count, per_token: E, and how many of them each token goes to.
      normalize: the weights of a token's experts sum to 1.
      shared_size: width of an expert that every token goes to; 0 where there is none.
    """

    count: int
    per_token: int
    normalize: bool = True
    shared_size: int = 0


CHOICES = {
    "norm": ("rms", "layer"),
    "norm_place": ("pre", "both", "post", "after"),
    "positions": ("rope", "learned", "alibi"),
    "activation": ("silu", "gelu", "gelu_tanh", "relu"),
    "qkv_layout": ("apart", "groups", "joined"),
    "qk_norm": (False, True, "whole"),
}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one decoder-only model.

    Attributes:
      vocab_size, hidden_size, intermediate_size, num_layers: V, D, F, L.
      num_heads, num_kv_heads, head_dim: N, K, H; N a multiple of K, H even.
      rope_theta, rope_scaling: base of the rotary frequencies, and their stretching.
      local_rope_theta: the base in layers of rope "local".
      rotary_dim: how many of a head's dimensions are rotated, the first ones; None all.
      rotary_pairs: neighbours (2i, 2i + 1) are rotated, not (i, i + rotary_dim / 2).
      positions: "rope", "learned" (a table of max_position + position_offset rows) or
        "alibi" (a bias that falls with the distance, arXiv:2108.12409).
      alibi_max: the last head's slope is 2 ** -alibi_max.
      alibi_rounded: Falcon's form of it: of the key's position, not of the distance,
        in bfloat16, and scaled together with the scores.
      norm, norm_bias: "rms" or "layer", and whether LayerNorm has a bias.
      norm_eps: added to the mean square, or variance, inside the norms.
      norm_offset: RMS norms multiply by 1 + scale.
      norm_place: of attention and of the MLP: "pre" x + f(norm(x)), "post"
        x + norm(f(x)), "both" x + norm(f(norm(x))), "after" norm(x + f(x)).
      parallel_norms: 0: attention first, then the MLP; 1 or 2: both read the layer's
        input, through one norm or one each, and are added together.
      final_norm, embed_norm: a norm after the last layer, and after the embedding.
      embed_scale: factor on the embedding, cast to the activation dtype.
      embed_width: of the embedding, and of the head, where it is not hidden_size.
      tie_embeddings: the unembedding is the embedding transposed.
      sliding_window: a token sees itself and the window - 1 tokens before it.
      layer_kinds: one LayerKind a layer; () where all have sliding_window and rotate.
      qkv_layout: kernels of queries, keys and values: "apart", "joined" (all heads
        behind each other) or "groups" (per kv head its queries, key and value).
      gate_up_joined: the MLP's gate and up are one kernel.
      qkv_bias, o_bias, mlp_bias, head_bias: biases on projections, and on logits.
      qk_norm: a norm of every query and key head before the rotation; "whole": one
        over all heads together.
      clip_qkv: c clips queries, keys and values to [-c, c]; None does not.
      query_scale: factor on q k; None is head_dim ** -0.5.
      attention_softcap: c > 0 replaces each score s by c tanh(s / c).
      activation: "silu", "gelu" (exact), "gelu_tanh" or "relu".
      gated: the MLP is down(f(gate x) * up x); else down(f(up x)).
      experts: a mixture of experts, whose width is intermediate_size; None: one MLP.
      residual_scale: factor on what a layer adds.
      logit_scale: factor on the logits.
      final_softcap: c > 0 replaces each logit z by c tanh(z / c); None does not.
      num_labels: 0 for a language model, 1 for a scalar (reward or value) head.
      max_position: pretrained context length, tokens.
      family: a row of families.FAMILIES, for the file format.
      bos_token_id, eos_token_ids, pad_token_id: special tokens, where known.
      generation: what else generation_config.json says, as JSON, for the export.

    Raises: ValueError naming the field that does not fit.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None
    rotary_dim: int | None = None
    rotary_pairs: bool = False
    positions: str = "rope"
    position_offset: int = 0
    alibi_max: float = 8.0
    alibi_rounded: bool = False
    norm: str = "rms"
    norm_bias: bool = False
    norm_eps: float = 1e-6
    norm_offset: bool = False
    norm_place: str = "pre"
    parallel_norms: int = 0
    final_norm: bool = True
    embed_norm: bool = False
    embed_scale: float = 1.0
    embed_width: int | None = None
    tie_embeddings: bool = False
    sliding_window: int | None = None
    layer_kinds: tuple[LayerKind, ...] = ()
    qkv_layout: str = "apart"
    gate_up_joined: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: bool | str = False
    clip_qkv: float | None = None
    query_scale: float | None = None
    attention_softcap: float | None = None
    activation: str = "silu"
    gated: bool = True
    experts: Experts | None = None
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    final_softcap: float | None = None
    num_labels: int = 0
    max_position: int = 2048
    family: str = "llama"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    generation: str = "{}"

    def __post_init__(self):
        sizes = {f.name for f in dataclasses.fields(self) if f.type is int}
        for name in sorted(sizes - {"num_labels", "position_offset", "parallel_norms"}):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name}={size!r} is not a positive integer")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not in {choices}")
        for problem in filter(None, self._problems()):
            raise ValueError(problem)

    def _problems(self) -> Iterator[str | None]:
        """What does not fit together, a message each."""
        if self.num_heads % self.num_kv_heads:
            yield (
                f"num_heads={self.num_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}"
            )
        if self.rotary_dim is None and self.positions == "rope" and self.head_dim % 2:
            yield f"head_dim={self.head_dim} is odd: it cannot be rotated"
        if self.rotary_dim is not None and (
            self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim
        ):
            yield f"rotary_dim={self.rotary_dim} is not even and up to head_dim"
        scaling, rotated = self.rope_scaling, self.rotary_dim or self.head_dim
        if scaling is not None and scaling.kind == "longrope":
            for factors in (scaling.short_factors, scaling.long_factors):
                if len(factors) != rotated // 2:
                    yield (
                        f"rope_scaling: longrope has {len(factors)} factors, and "
                        f"{rotated // 2} frequencies are stretched"
                    )
        if self.num_labels not in (0, 1):
            yield (
                f"num_labels={self.num_labels}: only 0 (language model) and 1 (reward "
                "or value) are supported"
            )
        for window in (self.sliding_window, *(kind.window for kind in self.kinds)):
            if window is not None and window < 1:
                yield f"sliding_window={window} is not positive"
        if self.layer_kinds and len(self.layer_kinds) != self.num_layers:
            yield f"layer_kinds has {len(self.layer_kinds)} of {self.num_layers} layers"
        if self.experts and not 1 <= self.experts.per_token <= self.experts.count:
            yield f"experts={self.experts}: per_token is not 1 to count"

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kinds of layers that there are, each once."""
        all_alike = (LayerKind(self.sliding_window),)
        return tuple(dict.fromkeys(self.layer_kinds or all_alike))

    @property
    def kind_of_layer(self) -> tuple[int, ...]:
        """Which of `kinds` each layer is."""
        kinds = self.layer_kinds or self.kinds * self.num_layers
        return tuple(map(self.kinds.index, kinds))

    @property
    def share_of_experts(self) -> float:
        """How many of all experts a token goes to; 1 where there are none."""
        return self.experts.per_token / self.experts.count if self.experts else 1.0

    @property
    def head_width(self) -> int:
        """D of hidden states, as heads take them."""
        return self.embed_width or self.hidden_size

    @property
    def eos_token_id(self) -> int | None:
        """The first end-of-text token, or None."""
        return self.eos_token_ids[0] if self.eos_token_ids else None

"""What a decoder is: sizes and switches; hashable, so it can be static in a jit."""

import dataclasses
from dataclasses import dataclass

ROPE_KINDS = ("linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pretrained length.

    Attributes:
      kind: "linear" (Chen et al. 2023, arXiv:2306.15595), "llama3" (Llama 3.1) or
        "yarn" (Peng et al. 2023, arXiv:2309.00071).
      factor: the new length over the old one.
      original_max_position: the pretrained length, tokens; llama3 and yarn.
      low_freq_factor, high_freq_factor: llama3's band, in turns over that length.
      beta_fast, beta_slow: yarn's band, in turns over that length.
      attention_factor: yarn's factor on cos and sin; None computes it from `factor`.
      mscale, mscale_all_dim: yarn as DeepSeek has it; used when both are set.
      truncate: yarn rounds its band outwards to whole dimensions.
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


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one decoder-only model.

    Attributes:
      vocab_size, hidden_size, intermediate_size, num_layers: V, D, F, L.
      num_heads, num_kv_heads, head_dim: N, K, H; N a multiple of K, H even.
      rope_theta, rope_scaling: base of the rotary frequencies, and their stretching.
      norm_eps: added to the mean square inside the RMS norms.
      tie_embeddings: the unembedding is the embedding transposed.
      sliding_window: a token sees itself and the window - 1 tokens before it.
      qkv_bias: biases on the query, key and value projections.
      qk_norm: RMS norm of every query and key head before the rotation.
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
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    sliding_window: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
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
        for name in sorted(sizes - {"num_labels"}):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name}={size!r} is not a positive integer")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd: it cannot be rotated")
        if self.num_labels not in (0, 1):
            raise ValueError(
                f"num_labels={self.num_labels}: only 0 (language model) and 1 (reward "
                "or value) are supported"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window={self.sliding_window} is not positive")

    @property
    def eos_token_id(self) -> int | None:
        """The first end-of-text token, or None."""
        return self.eos_token_ids[0] if self.eos_token_ids else None

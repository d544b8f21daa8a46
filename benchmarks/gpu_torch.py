"""torch's share of benchmarks.gpu: transformers' model, a plain loop, torch.compile."""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks import measure
from benchmarks.gpu import TIMED, WARM
from benchmarks.settings import Shape


def has_device(kind: str) -> bool:
    """Whether torch runs on a "gpu" (or "cpu", which it always does)."""
    return kind == "cpu" or torch.cuda.is_available()


def make_model(shape: Shape, device: str) -> LlamaForCausalLM:
    """float32 random parameters, attention through scaled_dot_product_attention."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        attn_implementation="sdpa",
    )
    with torch.device(_name(device)):
        return LlamaForCausalLM(config).float()


def _name(device: str) -> str:
    return "cuda" if device == "gpu" else "cpu"


def _autocast(device: str):
    return torch.autocast(_name(device), torch.bfloat16, enabled=device == "gpu")


def _tokens(shape: Shape, rows: int, length: int, device: str) -> torch.Tensor:
    return torch.randint(0, shape.vocab_size, (rows, length), device=_name(device))


def sft(shape: Shape, size: dict[str, int], device: str) -> dict[str, Any]:
    """Full rows."""
    model = make_model(shape, device)
    tokens = _tokens(shape, size["rows"], size["length"], device)

    def loss_fn():
        return -token_logps(model, tokens).mean()

    return timed(train(model, loss_fn, device), device)


def dpo(shape: Shape, size: dict[str, int], device: str) -> dict[str, Any]:
    """Pairs of full rows, with the reference's pass in every step."""
    model, reference = make_model(shape, device), make_model(shape, device)
    tokens = _tokens(shape, 2 * size["rows"], size["length"], device)

    def reward(model):
        return token_logps(model, tokens).sum(-1)

    score = torch.compile(reward)

    def loss_fn():
        with torch.no_grad():
            anchor = score(reference)
        chosen, rejected = (reward(model) - anchor).chunk(2)
        return -F.logsigmoid(0.1 * (chosen - rejected)).mean()

    return timed(train(model, loss_fn, device), device)


def token_logps(model, tokens: torch.Tensor) -> torch.Tensor:
    """[B, T] -> float32 [B, T-1]."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    targets = tokens[:, 1:]
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return -nll.view(targets.shape)


def train(model, loss_fn, device: str):
    """Yields the loss of each step: autocast, clipped gradients, fused AdamW."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-5, weight_decay=0.0, fused=device == "gpu"
    )
    compiled = torch.compile(loss_fn)
    for _ in range(WARM + TIMED):
        with _autocast(device):
            loss = compiled()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.item()


def sample(shape: Shape, size: dict[str, int], device: str) -> dict[str, Any]:
    """`generate` with a static cache, which transformers compiles; bfloat16 weights."""
    model = make_model(shape, device)
    if device == "gpu":
        model = model.to(torch.bfloat16)
    tokens = _tokens(shape, size["rows"], size["prompt"], device)
    model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=size["new"],
        cache_implementation="static",
        eos_token_id=None,
        pad_token_id=0,
    )

    def calls():
        for _ in range(WARM + TIMED):
            with torch.inference_mode():
                yield model.generate(tokens, attention_mask=torch.ones_like(tokens))

    return timed(calls(), device)


def timed(steps, device: str) -> dict[str, Any]:
    """Seconds of each step, the device's name and its peak memory in bytes."""

    def synchronized():
        for value in steps:
            if device == "gpu":
                torch.cuda.synchronize()
            yield value

    spans, _ = measure.laps(synchronized())
    if device == "cpu":
        return {"seconds": spans.seconds, "device": "cpu", "peak": None}
    return {
        "seconds": spans.seconds,
        "device": torch.cuda.get_device_name(),
        "peak": torch.cuda.max_memory_allocated(),
    }


PIECES = {"sft": sft, "dpo": dpo, "sample": sample}

"""Every family beside transformers: packed rows, decoding with a cache, gradients."""

import functools
import tempfile

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from jalign import forward  # noqa: E402
from jalign.models import load  # noqa: E402
from jalign.types import TokenBatch  # noqa: E402
from scripts.make_model_golden import CASES, build, inputs  # noqa: E402
from tests.models.rows import packed_rows  # noqa: E402
from tests.parity.test_models_parity import assert_close, torch_logits  # noqa: E402

# What differs from others in names, or in the file alone.
SAME = {"llama_tied", "llama_linear", "llama_yarn", "qwen2_window", "mpt"}
SAME |= {"gpt_neox_sequential", "gpt_neox_reward", "opt_no_bias", "qwen3_reward"}
PACKED = sorted(CASES.keys() - SAME)
# longrope's keys of a cache keep the table of their time, transformers computes them
# anew where a row crosses the pretrained length.
DECODED = [n for n in PACKED if not n.endswith("_reward") and n != "phi3_long"]
TRAINED = ("opt_350m", "bloom", "gpt_neox", "gptj", "gemma2", "phi3", "olmo2")
TRAINED += ("qwen2_moe",)
OPTIONS = {"xla_backend_optimization_level": 0}  # little is computed, much compiled


def loaded(theirs):
    """(model, params) of a transformers model, by way of its files."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return load(folder)


@functools.cache
def pair(name):
    """(transformers' model, ours, params). Layers are unrolled and nothing is jitted:
    so only what the families before have not needed is compiled."""
    theirs = build(*CASES[name])
    model, params = loaded(theirs)
    return theirs, model.replace(unroll=True), params


def outputs(model, params, hidden):
    if model.config.num_labels:
        return model.score(params, hidden)
    return model.head(params).logits(hidden)


@pytest.mark.parametrize("name", PACKED)
def test_packed_documents_are_those_of_transformers(name):
    """A row of nine and three tokens: beyond the windows, and on both sides of
    longrope's length."""
    theirs, model, params = pair(name)
    (ids, positions), tokens = packed_rows([[9, 3]], 12), inputs()[0][:1]
    parts = slice(9), slice(9, 12)
    want = [torch_logits(theirs, tokens[:, part]) for part in parts]
    for attention in ("plain", "blocked"):
        hidden, _ = model.replace(attention=attention).apply(
            params, tokens, positions=positions, segment_ids=ids
        )
        got = outputs(model, params, hidden)
        for part, logits in zip(parts, want, strict=True):
            last = slice(-1, None) if model.config.num_labels else slice(None)
            assert_close(got[:, part][:, last], logits)


@pytest.mark.parametrize("name", DECODED)
def test_decoding_with_a_cache_is_transformers_one_pass(name):
    """Right-padded prompts of 7 and 4; then one token at a time, to 9 and 6."""
    theirs, model, params = pair(name)
    tokens = np.random.default_rng(2).integers(1, 48, (2, 9)).astype(np.int32)
    want = torch_logits(theirs, tokens)
    cache, lengths = model.init_cache(2, 10), np.array([7, 4])
    ids = (np.arange(7) < lengths[:, None]).astype(np.int32)
    hidden, cache = model.apply(
        params, tokens[:, :7] * ids, segment_ids=ids, cache=cache
    )
    got = outputs(model, params, hidden)
    assert_close(got[ids > 0], want[:, :7][ids > 0])
    for step in range(2):
        at = (lengths + step)[:, None].astype(np.int32)
        new = np.take_along_axis(tokens, at, 1)
        hidden, cache = model.apply(params, new, positions=at, cache=cache)
        got = outputs(model, params, hidden)[:, 0]
        assert_close(got, want[np.arange(2), at[:, 0]])


@pytest.mark.parametrize("name", TRAINED)
def test_the_gradient_of_the_sft_loss_is_torchs(name):
    """Of every parameter. torch's gradients take the way of weights: its files, and
    the rows of the family's tensors."""
    theirs = build(*CASES[name])
    model, params = loaded(theirs)
    tokens, mask = inputs()
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape)
    batch = TokenBatch(tokens, mask > 0, mask, positions)

    def loss(params):
        return -forward.token_logps(model, params, batch).sum()

    got = jax.jit(jax.grad(loss), compiler_options=OPTIONS)(params)
    logits = theirs(torch.tensor(tokens).long(), attention_mask=torch.tensor(mask))
    logps = torch.log_softmax(logits.logits[:, :-1], dim=-1)
    targets = torch.tensor(tokens[:, 1:]).long()
    each = logps.gather(-1, targets[..., None])[..., 0] * torch.tensor(mask[:, 1:])
    (-each.sum()).backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            gradient = parameter.grad
            parameter.copy_(torch.zeros(()) if gradient is None else gradient)
    _, want = loaded(theirs)
    # That of a bias of keys is 0, for a softmax is the same without it.
    rounding = 1e-3 * max(np.linalg.norm(x) for x in jax.tree.leaves(want))
    for (path, x), y in zip(
        jax.tree.leaves_with_path(want), jax.tree.leaves(got), strict=True
    ):
        error = np.linalg.norm(y - x) / max(np.linalg.norm(x), rounding)
        assert error < 1e-4, (jax.tree_util.keystr(path), error)

"""What Tunix's trainers, sampler and learners share: the model and the settings."""

import jax
import optax
from tunix.models.llama3 import model as llama3, params as llama3_params

from benchmarks import assets, settings


def load(model: str, folder: str, *, tied: bool = True):
    """The shared checkpoint as a Llama3, float32, on a mesh of one device."""
    shape = settings.MODELS[model]
    config = llama3.ModelConfig(
        num_layers=shape.num_layers,
        vocab_size=shape.vocab_size,
        embed_dim=shape.hidden_size,
        hidden_dim=shape.intermediate_size,
        num_heads=shape.num_heads,
        head_dim=shape.head_dim,
        num_kv_heads=shape.num_kv_heads,
        rope_theta=1_000_000,
        norm_eps=1e-6,
        weight_tying=tied,
    )
    path = str(assets.folder(model) / folder)
    return llama3_params.create_model_from_safe_tensors(path, config, make_mesh())


def make_mesh():
    """As in its notebooks, on one device."""
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=auto)


def optimizer(piece: str) -> optax.GradientTransformation:
    """The settings that all frameworks share."""
    return optax.chain(
        optax.clip_by_global_norm(settings.MAX_GRAD_NORM),
        optax.adam(settings.LEARNING_RATE[piece]),
    )


def options() -> dict:
    """Of every trainer; without directories it keeps no checkpoints and no logs."""
    steps = settings.WARM_STEPS + settings.TIMED_STEPS
    return {"eval_every_n_steps": 10**6, "max_steps": steps}

"""TRL's settings for the comparison, in transformers' names; imports nothing of it."""

from benchmarks import settings

# float32 on the CPU; activations are kept, since they fit, as jalign keeps them.
QUIET = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def options(piece: str, out: str, steps: int) -> dict:
    """The settings that all frameworks share.

    Args:
      piece: of settings.PIECES.
      out: the run's folder.
      steps: how many.
    """
    return {
        "output_dir": out,
        "per_device_train_batch_size": settings.ROWS,
        "max_steps": steps,
        "learning_rate": settings.LEARNING_RATE[piece],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": settings.MAX_GRAD_NORM,
        "train_sampling_strategy": "sequential",
        "max_length": settings.LENGTH,
        "model_init_kwargs": {"dtype": "float32"},
    } | QUIET

"""Training: objectives, the step, optimizers, checkpoints, metrics and recipes."""

"""What the one-shot commands do: `jalign generate` and `jalign eval`."""

from jalign.commands.evaluation import EvalConfig, run_eval
from jalign.commands.generation import GenerateConfig, run_generate

__all__ = ["EvalConfig", "GenerateConfig", "run_eval", "run_generate"]

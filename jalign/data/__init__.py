"""Rows to batches: formats, chat templates, masks, packing, a deterministic loader.

NumPy only. Nothing here touches a device; `datasets`, `transformers` and `grain` are
imported when a function needs them.
"""

from jalign.data.batching import (
    PackedPairs,
    PackedRow,
    bucket_length,
    collate_preferences,
    collate_tokens,
    pack,
)
from jalign.data.columns import are_pairs, parse_columns
from jalign.data.encoding import Example
from jalign.data.examples import (
    PreferenceExample,
    PromptExample,
    example_length,
    filler,
    preference_examples,
    prompt_examples,
    sft_examples,
)
from jalign.data.loader import (
    balanced_order,
    batch_indices,
    make_eval_loader,
    make_loader,
    num_steps,
)
from jalign.data.rows import BadRow, Row, Rows
from jalign.data.sources import load_rows
from jalign.data.special_tokens import (
    DEFAULT_CHAT_TEMPLATE,
    end_template_at_turn,
    ensure_chat_template,
    stop_tokens,
)
from jalign.data.splits import HELD_OUT
from jalign.data.tokenizer import check_vocab, load_tokenizer

__all__ = [
    "DEFAULT_CHAT_TEMPLATE",
    "HELD_OUT",
    "BadRow",
    "Example",
    "PackedPairs",
    "PackedRow",
    "PreferenceExample",
    "PromptExample",
    "Row",
    "Rows",
    "are_pairs",
    "balanced_order",
    "batch_indices",
    "bucket_length",
    "check_vocab",
    "collate_preferences",
    "collate_tokens",
    "end_template_at_turn",
    "ensure_chat_template",
    "example_length",
    "filler",
    "load_rows",
    "load_tokenizer",
    "make_eval_loader",
    "make_loader",
    "num_steps",
    "pack",
    "parse_columns",
    "preference_examples",
    "prompt_examples",
    "sft_examples",
    "stop_tokens",
]

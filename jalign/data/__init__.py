"""Rows to batches: formats, chat templates, masks, packing, a deterministic loader.

NumPy only. Nothing here touches a device; `datasets`, `transformers` and `grain` are
imported when a function needs them.
"""

from jalign.data.batching import (
    PackedPairs as PackedPairs,
    PackedRow as PackedRow,
    bucket_length as bucket_length,
    collate_preferences as collate_preferences,
    collate_tokens as collate_tokens,
    pack as pack,
)
from jalign.data.columns import (
    are_pairs as are_pairs,
    parse_columns as parse_columns,
)
from jalign.data.encoding import Example as Example
from jalign.data.examples import (
    PreferenceExample as PreferenceExample,
    PromptExample as PromptExample,
    example_length as example_length,
    filler as filler,
    preference_examples as preference_examples,
    prompt_examples as prompt_examples,
    sft_examples as sft_examples,
)
from jalign.data.files import HELD_OUT as HELD_OUT
from jalign.data.loader import (
    balanced_order as balanced_order,
    batch_indices as batch_indices,
    make_eval_loader as make_eval_loader,
    make_loader as make_loader,
    num_steps as num_steps,
)
from jalign.data.rows import (
    BadRow as BadRow,
    Row as Row,
    Rows as Rows,
)
from jalign.data.sources import load_rows as load_rows
from jalign.data.special_tokens import (
    DEFAULT_CHAT_TEMPLATE as DEFAULT_CHAT_TEMPLATE,
    end_template_at_turn as end_template_at_turn,
    ensure_chat_template as ensure_chat_template,
    stop_tokens as stop_tokens,
)
from jalign.data.tokenizer import (
    check_vocab as check_vocab,
    load_tokenizer as load_tokenizer,
)

__all__ = sorted(n for n, value in vars().items() if callable(value) or n.isupper())  # pyright: ignore

"""Rows to examples: token ids with a mask of what is trained, cut to a length.

The truncation policy: an example that is too long keeps its start, so BOS and the
prompt stay and the EOS is lost rather than forged; an example with no trained token
left is dropped and counted; prompts for sampling are dropped, never cut. More than a
tenth dropped is a warning, more than half an error, unless bad rows are skipped.
"""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jalign.data.columns import (
    Columns,
    parse_by_columns,
    preference_layout,
    prompt_layout,
    sft_layout,
)
from jalign.data.encoding import (
    Example,
    check_masks_apply,
    encode_exchanges,
    encode_prompts,
)
from jalign.data.formats import (
    Exchange,
    Preference,
    Prompt,
    parse_preference,
    parse_prompt,
    parse_sft,
)
from jalign.data.rows import (
    BadRow,
    RowError,
    Share,
    alone,
    check_bad_rows_mode,
    encode_some,
    settle,
    sort_out,
    total_rows,
)
from jalign.data.tokenizer import Tokenizer

logger = logging.getLogger("jalign.data")

MANY_DROPPED, MOST_DROPPED = 0.1, 0.5
"""Shares of the rows above which losing them is a warning, and an error."""


class PreferenceExample(NamedTuple):
    """Two documents that start with the same prompt.

    Attributes:
      chosen, rejected: Example.
      margin: how much better the chosen one was judged; 0 if unknown.
      ref_chosen_logp, ref_rejected_logp: nats, under the frozen reference, once known.
    """

    chosen: Example
    rejected: Example
    margin: float = 0.0
    ref_chosen_logp: float = 0.0
    ref_rejected_logp: float = 0.0


def sides(example: Any) -> tuple[Any, ...]:
    """The documents of an example: of a pair chosen and rejected, else itself alone."""
    return example[:2] if isinstance(example, PreferenceExample) else (example,)


def side_lengths(example: Any) -> list[int]:
    """Tokens of each document of an example."""
    return [len(side.tokens) for side in sides(example)]


def example_length(example: Any) -> int:
    """Tokens of an example; of a pair, of its longer side."""
    return max(side_lengths(example))


def filler(example: Any) -> Any:
    """An example of the same kind without tokens: a row that counts nothing."""
    empty = Example(np.zeros(0, np.int32), np.zeros(0, bool))
    return PreferenceExample(empty, empty) if len(sides(example)) > 1 else empty


class PromptExample(NamedTuple):
    """A prompt for sampling.

    Attributes:
      tokens: int32 [T].
      text: the prompt as the model sees it, templated if it was a conversation.
      row: the whole row as it was read, for reward functions.
      source: the prompt before the template: a text or messages; None where unknown.
    """

    tokens: np.ndarray
    text: str
    row: dict[str, Any]
    source: Prompt | None = None


def sft_examples(
    rows: Sequence[dict],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    assistant_only: bool | None = None,
    completion_only: bool | None = None,
    bad_rows: str = "error",
    over_length: str = "truncate",
    columns: Columns = None,
    share: Share = alone,
) -> tuple[list[Example], dict[str, int]]:
    """Makes supervised examples of conversations, prompts with answers, and texts.

    Args:
      rows: from `load_rows`, or any list of dicts.
      tokenizer: a fast Hugging Face tokenizer with an EOS token.
      max_length: longest example, in tokens.
      assistant_only: train only the assistant's turns of `messages`. None means yes.
      completion_only: train only the completion of `prompt` + `completion` rows. None
        means yes.
      bad_rows: "error", or "skip" to leave unusable rows out, however many, and count
        them.
      over_length: "truncate" keeps the start; "drop" leaves long examples out.
      columns: other names, {"prompt": "question"} or "prompt=question,completion=...";
        "ignore" names columns that are not to be read. docs/data.md has the table of
        the layouts that need none.
      share: how processes divide templating and tokenizing, see `rows.Share`.

    Returns:
      The examples, in the order of the rows, and counts: rows, examples, bad_rows (in
      all, and by field and reason), over_length (dropped), truncated (kept).

    Raises:
      ValueError: bad rows by file, row, field and reason; more than half of the usable
        rows too long (with "skip" only if all are); an option that does not apply.
    """
    _check_options(max_length, bad_rows, over_length)
    exchanges = parse_by_columns(rows, parse_sft, sft_layout, columns)
    masks = {"assistant_only": assistant_only, "completion_only": completion_only}
    check_masks_apply([e for e in exchanges if isinstance(e, Exchange)], **masks)
    encode = partial(encode_exchanges, tokenizer=tokenizer, **masks)
    found = sort_out(rows, encode_some(exchanges, partial(encode, share=share)))
    return _finish(rows, *found, max_length, bad_rows, over_length)


def preference_examples(
    rows: Sequence[dict],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    bad_rows: str = "error",
    over_length: str = "truncate",
    columns: Columns = None,
    keep_tail: bool = False,
    share: Share = alone,
) -> tuple[list[PreferenceExample], dict[str, int]]:
    """Makes pairs of `chosen` + `rejected` rows, for reward models and DPO alike.

    Args:
      rows, tokenizer, max_length, bad_rows, columns, share: as in `sft_examples`.
      over_length: "truncate" keeps the start of both sides, and drops the pair if a
        side has no completion left or both have become equal; "drop" drops any pair
        with a side that is too long (better for reward models, which read the end).
      keep_tail: keep what the chat template writes behind the last trained token, where
        a reward model of others is read (docs/numerics.md).

    Returns: the pairs and the counts. Raises: ValueError, as `sft_examples`.
    """
    _check_options(max_length, bad_rows, over_length)
    how: dict[str, Any] = {"keep_tail": keep_tail, "share": share}

    def encode(found: list[Preference]) -> list[PreferenceExample | RowError]:
        chosen = [Exchange(p.prompt, p.chosen, p.template_args) for p in found]
        rejected = [Exchange(p.prompt, p.rejected, p.template_args) for p in found]
        better = encode_exchanges(chosen, tokenizer, **how)
        worse = encode_exchanges(rejected, tokenizer, eos_inside=True, **how)
        return list(map(_pair, better, worse, [p.margin for p in found]))

    parsed = parse_by_columns(rows, parse_preference, preference_layout, columns)
    found = sort_out(rows, encode_some(parsed, encode))
    return _finish(rows, *found, max_length, bad_rows, over_length)


def prompt_examples(
    rows: Sequence[dict],
    tokenizer: Tokenizer,
    *,
    max_prompt_length: int,
    bad_rows: str = "error",
    columns: Columns = None,
    share: Share = alone,
) -> tuple[list[PromptExample], dict[str, int]]:
    """Makes prompts for sampling of the rows that `sft_examples` and
    `preference_examples` take: the same tokens as there, without the answers.

    A conversation is templated up to where the assistant speaks; trailing assistant
    turns of `messages` rows are left out. Longer prompts are dropped and counted,
    never cut: a cut prompt asks something else.

    Returns: the prompts and the counts. Raises: ValueError, as `sft_examples`.
    """
    _check_options(max_prompt_length, bad_rows, "drop")
    found = encode_prompt_rows(rows, tokenizer, columns, share=share)
    return _finish(rows, *found, max_prompt_length, bad_rows, "drop", "prompt_")


def encode_prompt_rows(
    rows: Sequence[dict],
    tokenizer: Tokenizer,
    columns: Columns = None,
    *,
    quiet: bool = False,
    share: Share = alone,
) -> tuple[list[PromptExample], list[BadRow]]:
    """The prompts of all rows that have one, whatever their length; the other rows."""
    layout_of = None if quiet else prompt_layout
    prompts: list[Any] = parse_by_columns(rows, parse_prompt, layout_of, columns)
    encoded = encode_some(prompts, partial(encode_prompts, tokenizer, share=share))
    for i, item in enumerate(encoded):
        if not isinstance(item, RowError):
            encoded[i] = PromptExample(item[1], item[0], dict(rows[i]), prompts[i])
    return sort_out(rows, encoded)


def _check_options(max_length: int, bad_rows: str, over: str) -> None:
    check_bad_rows_mode(bad_rows)
    if over not in ("truncate", "drop"):
        raise ValueError(f"over_length must be 'truncate' or 'drop', not {over!r}")
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, not {max_length}")


def _pair(chosen: Any, rejected: Any, margin: float) -> PreferenceExample | RowError:
    for side in (chosen, rejected):
        if isinstance(side, RowError):
            return side
    if np.array_equal(chosen.tokens, rejected.tokens):
        return RowError("rejected", "has the same tokens as chosen")
    return PreferenceExample(chosen, rejected, margin)


def _fit(example: Any, max_length: int, over_length: str) -> Any:
    """Cuts the ends off; None where that leaves nothing to train or to tell apart."""
    if example_length(example) <= max_length:
        return example
    if over_length == "drop":
        return None
    cut = [Example(*(x[:max_length] for x in side)) for side in sides(example)]
    if not all(side.completion_mask.any() for side in cut):
        return None
    if not isinstance(example, PreferenceExample):
        return cut[0]
    same = np.array_equal(cut[0].tokens, cut[1].tokens)
    return None if same else example._replace(chosen=cut[0], rejected=cut[1])


def _finish(
    rows: Sequence[dict],
    good: list[Any],
    bad: list[BadRow],
    max_length: int,
    bad_rows: str,
    over_length: str,
    which: str = "",
) -> tuple[list[Any], dict[str, int]]:
    """Cuts or drops what is too long, counts, and refuses to lose most of the rows."""
    total = total_rows(rows)
    counts = settle(bad, total, bad_rows)
    fitted = [_fit(example, max_length, over_length) for example in good]
    kept = [example for example in fitted if example is not None]
    dropped = len(fitted) - len(kept)
    lost = (
        f"{dropped} of the {len(fitted)} usable rows do not fit: with "
        f"max_{which}length={max_length} nothing to train or sample from is left of "
        "them; raise it"
    )
    if not kept:
        raise ValueError(lost)
    if dropped > len(fitted) * MOST_DROPPED and bad_rows == "error":
        raise ValueError(f"{lost}, or pass bad_rows='skip' (--bad-rows skip)")
    if dropped > len(fitted) * MANY_DROPPED:
        logger.warning("%s", lost)
    if len(bad) > total * MANY_DROPPED:
        reasons = ", ".join(f"{n} x {k[9:]}" for k, n in counts.items() if "/" in k)
        unusable = f"{len(bad)} of {total} rows are unusable and left out"
        logger.warning("%s (%s): mend them, or name their columns", unusable, reasons)
    whole = sum(before is after for before, after in zip(good, fitted, strict=True))
    result = {"rows": total, "examples": len(kept), "over_length": dropped}
    result |= {"truncated": len(kept) - whole, **counts}
    logger.info("%s", ", ".join(f"{name} {n}" for name, n in result.items() if n))
    return kept, result

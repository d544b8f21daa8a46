"""Text to token ids: BOS once, EOS learned, prompt tokens as sampling will see them."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from jalign.data.rows import Share, alone
from jalign.data.special_tokens import (
    Tokenizer,
    leading_ids,
    settle_pad_token,
    split_turn,
    turn_end,
)
from jalign.paths import is_remote, located, on_disk

logger = logging.getLogger("jalign.data")
_SUFFIXES = ".json", ".model", ".txt", ".jinja"  # of the files of a tokenizer

Spans = list[tuple[int, int]]
"""Of characters of a text, [start, end)."""
CHUNK = 1024  # texts a call: Python lists of ids are many times larger than arrays


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a Hugging Face tokenizer and settles its EOS and pad tokens.

    jalign masks by length and never looks at pad ids, but the checkpoints it writes
    are read by others, see `settle_pad_token`. No token is ever added.

    Args:
      path: a directory with the tokenizer's files, a URL of one, or a hub id.

    Raises:
      ValueError: no EOS token, not a fast tokenizer, an empty one, or nothing loadable
        there.
    """
    from transformers import AutoTokenizer

    local = located(path).expanduser()
    with on_disk(local, *_SUFFIXES) as folder:
        source = str(folder if folder.exists() else path)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except Exception as error:  # many kinds, by file format
            said = str(error).replace(source, str(path))
            raise ValueError(f"{path}: no tokenizer can be loaded: {said}") from error
    if is_remote(local):
        tokenizer.name_or_path = str(path)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{path}: not a fast tokenizer (there is no tokenizer.json)")
    _check_not_empty(tokenizer, path)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{path}: the tokenizer has no EOS token, so nothing could learn to stop; "
            "set eos_token in tokenizer_config.json"
        )
    settle_pad_token(tokenizer)
    return tokenizer


def _check_not_empty(tokenizer: Tokenizer, path: str | Path) -> None:
    """transformers makes an empty tokenizer of a folder that only names its class."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values()}
    if not tokenizer.get_vocab().keys() - special - set(tokenizer.all_special_tokens):
        raise ValueError(
            f"{path}: the tokenizer has no tokens but special ones; is tokenizer.json "
            "missing? Copy it there from the model that this one was made of"
        )


def check_vocab(
    tokenizer: Tokenizer, vocab_size: int, *, where: str = "this model"
) -> None:
    """Raises ValueError if the tokenizer can give ids that the model does not embed."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(
            f"{where}: the tokenizer gives ids up to {largest} ({token!r}), but the "
            f"model embeds only {vocab_size}: they do not belong together"
        )


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Raw texts to int32 ids [T], with the tokenizer's BOS exactly once and no EOS."""
    bos = leading_ids(tokenizer)
    return [with_bos(bos, ids) for ids in encode_plain(tokenizer, texts)]


def with_bos(bos: list[int], ids: np.ndarray) -> np.ndarray:
    """The ids of a text behind its `leading_ids`, which they may begin with already."""
    begun = bos and ids[:1].tolist() == bos
    return ids if begun else np.append(np.array(bos, np.int32), ids)


def encode_plain(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Texts to int32 ids [T], nothing added: templated text brings its own BOS.

    The ids of `tokenizer(texts, add_special_tokens=False)`, without the offsets and
    lists that it makes beside them, which take as long.
    """
    backend, rows = tokenizer.backend_tokenizer, []
    backend.no_truncation()  # as a call of the tokenizer has it
    backend.no_padding()
    for start in range(0, len(texts), CHUNK):
        encoded = backend.encode_batch_fast(
            list(texts[start : start + CHUNK]), add_special_tokens=False
        )
        rows += [np.array(encoding.ids, np.int32) for encoding in encoded]
    return rows


def encode_spans(
    tokenizer: Tokenizer, items: Sequence[tuple[str, Spans]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Templated texts to int32 ids [T] and bool masks [T], True in one of the spans."""
    results = []
    for first in range(0, len(items), CHUNK):
        chunk = items[first : first + CHUNK]
        encoded = tokenizer(
            [text for text, _ in chunk],
            add_special_tokens=False,  # the template has written them
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        for ids, offsets, (_, spans) in zip(
            encoded["input_ids"], encoded["offset_mapping"], chunk, strict=True
        ):
            starts = np.array([start for start, _ in offsets], np.int64)
            mask = np.zeros(len(ids), bool)
            for start, end in spans:
                mask |= (starts >= start) & (starts < end)
            results.append((np.array(ids, np.int32), mask))
    return results


def encode_pairs(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], share: Share = alone
) -> list[tuple[np.ndarray, int]]:
    """Prompts with completions to (ids, length of the prompt's ids), ending in EOS.

    The ids start with the prompt's own ids, as at sampling time. Where tokenizing
    prompt and completion as one text would merge across the border, the completion is
    tokenized apart. If even that changes the text, the one text is split behind its
    last token of the prompt, and a warning says so.
    """
    found = share(partial(_encode_pairs, tokenizer), pairs)
    merged = sum(way != _AS_ONE for *_, way in found)
    unlike = sum(way == _SPLIT for *_, way in found)
    if merged:
        counts = merged, len(pairs)
        logger.info("%d of %d texts merge tokens of prompt and completion", *counts)
    if unlike:
        counts = unlike, len(pairs)
        logger.warning(
            "%d of %d prompts are not trained with the tokens that sampling sees, as "
            "their last one merges with the completion: move white space at the end of "
            "the prompt to the start of the completion",
            *counts,
        )
    return [(ids, start) for ids, start, _ in found]


_AS_ONE, _APART, _SPLIT = range(3)
"""The ways to tokenize a prompt with its completion, see `encode_pairs`."""


def _encode_pairs(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]
) -> list[tuple[np.ndarray, int, int]]:
    """As `encode_pairs`, and in which way."""
    prompts = encode_texts(tokenizer, [prompt for prompt, _ in pairs])
    wholes = encode_texts(tokenizer, [prompt + rest for prompt, rest in pairs])
    shared = map(common_prefix, prompts, wholes)
    merged = [i for i, n in enumerate(shared) if n < len(prompts[i])]
    ways = [_AS_ONE] * len(pairs)
    aparts = _apart(tokenizer, [pairs[i][1] for i in merged])
    for i, rests in zip(merged, aparts, strict=True):
        want = tokenizer.decode(wholes[i])
        tried = (np.append(prompts[i], rest) for rest in rests)
        same = next((x for x in tried if tokenizer.decode(x) == want), None)
        ways[i] = _SPLIT if same is None else _APART
        wholes[i] = wholes[i] if same is None else same
    eos = tokenizer.eos_token_id
    ended = [
        ids if ids[-1:].tolist() == [eos] else np.append(ids, np.int32(eos))
        for ids in wholes
    ]
    return list(zip(ended, map(common_prefix, prompts, wholes), ways, strict=True))


def _apart(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[np.ndarray]]:
    """The ways to tokenize each text apart from what goes before it.

    As it is, and for a tokenizer that puts a space before each text (SentencePiece's)
    behind a line break, which takes the space on itself and merges with no word.
    """
    (edge,) = encode_plain(tokenizer, ["\n"])
    ways = [[rest] for rest in encode_plain(tokenizer, texts)]
    behind = encode_plain(tokenizer, ["\n" + text for text in texts])
    for way, ids in zip(ways, behind, strict=True):
        if np.array_equal(ids[: len(edge)], edge):
            way.append(ids[len(edge) :])
    return ways


def common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """How many leading elements two arrays share."""
    n = min(len(first), len(second))
    differ = first[:n] != second[:n]
    return int(np.argmax(differ)) if differ.any() else n


def turn_tail_ids(tokenizer: Tokenizer) -> np.ndarray | None:
    """What the chat template writes behind an answer, as token ids int32 [T].

    None where it ends a turn with no special token, so that the ids depend on the
    answer before them.
    """
    if turn_end(tokenizer) is None:
        return None
    head, tail = split_turn(tokenizer)
    before, whole = encode_plain(tokenizer, [head, head + tail])
    same = common_prefix(before, whole) == len(before)
    return whole[len(before) :] if same else None

"""The small files of a checkpoint folder, each written whole or not at all."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from jalign.mirror import Mirror
from jalign.paths import children, written

_OLD_FILES = re.compile(r"(model|delta)(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Writes it whole or not at all."""
    with written(file) as here:
        here.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def save_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Writes its files so that transformers 4 and 5 read the same tokenizer.

    5 calls a tokenizer without a class of its own by a name that 4 does not know, and
    lists more special tokens under a key that 4 expects to be an object.
    """
    with Mirror(folder) as here:
        _save_tokenizer(here, tokenizer)


def _save_tokenizer(folder: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    for key in ("backend", "is_local", "local_files_only"):
        values.pop(key, None)  # of the loading, not of the tokenizer
    write_json(file, values)


def remove_weights(folder: Path, but: set[str]) -> None:
    """Removes the weight files of an older checkpoint, but those of these names."""
    for file in children(folder):
        if _OLD_FILES.fullmatch(file.name) and file.name not in but:
            file.unlink()


def write_tensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file, whole or not at all."""
    from safetensors.numpy import save_file

    with written(file) as here:
        # transformers refuses files that do not say which framework they are for.
        save_file(tensors, here, metadata={"format": "pt"})

"""Chat templates are programs of strangers: bounds on what one rendering may take.

transformers' sandbox keeps them from files and from Python's own attributes, not from
running for ever or filling the memory.
"""

import contextlib
import functools
import inspect
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jalign.data.rows import RowError

SECONDS = 5.0
MEMORY = 1 << 30  # bytes beyond what the process has
MAX_TEMPLATE, MAX_TEXT = 1 << 20, 4 << 20  # characters
_PAGE = resource.getpagesize()
_STATM = Path("/proc/self/statm")


def check_template(tokenizer: Any, args: dict[str, Any]) -> None:
    """Raises ValueError for a template that is too long, RowError for a row whose
    `chat_template_kwargs` would set more than variables of the template."""
    template = tokenizer.chat_template
    if isinstance(template, str) and len(template) > MAX_TEMPLATE:
        raise ValueError(
            f"the tokenizer's chat template has {len(template)} characters, more than "
            f"{MAX_TEMPLATE}: not a template"
        )
    if not args:
        return
    taken = _parameters(type(tokenizer)) | tokenizer.special_tokens_map.keys()
    wrong = sorted(args.keys() & taken)
    if wrong:
        raise RowError(
            "chat_template_kwargs",
            f"{wrong[0]!r} is set by the tokenizer and by jalign, not by a row",
        )


@functools.cache
def _parameters(kind: type) -> frozenset[str]:
    names = inspect.signature(kind.apply_chat_template).parameters.keys()
    return frozenset({*names, "messages"} - {"tools", "documents", "kwargs"})


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raises ValueError where the body takes longer, or more memory.

    Not a RowError: another row would take as long again. The time is limited in the
    main thread, the memory where the system tells (Linux).
    """
    try:
        with _memory_limit(MEMORY), _time_limit(SECONDS):
            yield
    except TooLong:
        took = f"did not finish within {SECONDS:g} s"
    except MemoryError:
        took = f"needs more than {MEMORY >> 20} MiB of memory"
    else:
        return
    raise ValueError(
        f"the tokenizer's chat template {took} on one conversation: it is broken or "
        "hostile; use another model's tokenizer, or mend chat_template"
    )


@contextlib.contextmanager
def rendering(tokenizer: Any) -> Iterator[None]:
    """`limited`, and what is wrong in the body as RowError with the template's own
    complaint; ValueError for a template that cannot be compiled, so of no row.
    """
    from jinja2 import TemplateSyntaxError

    with limited():
        try:
            yield
        except (MemoryError, TooLong):
            raise
        except TemplateSyntaxError as error:
            raise ValueError(
                f"{tokenizer.name_or_path or 'the tokenizer'}: its chat template "
                f"cannot be compiled: line {error.lineno}: {error.message}; mend it, "
                "in chat_template.jinja or tokenizer_config.json"
            ) from None
        except Exception as error:  # jinja's kinds and whatever a template runs into
            raise RowError("(chat template)", f"refuses the row: {error}") from None


class TooLong(Exception):
    """Raised in the main thread when the time is over."""


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(number, frame):
        raise TooLong

    before, start = signal.signal(signal.SIGALRM, over), time.monotonic()
    # Again each second, in case something in between swallowed the first.
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if timer[0]:  # somebody else's goes on
            left = max(timer[0] - (time.monotonic() - start), 1e-3)
            signal.setitimer(signal.ITIMER_REAL, left, timer[1])


@contextlib.contextmanager
def _memory_limit(memory: int) -> Iterator[None]:
    size = _size_of_process(int(10 * time.monotonic()))
    if size is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = size + memory
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@functools.lru_cache(maxsize=1)
def _size_of_process(tenth: int) -> int | None:
    """Bytes of address space, looked up once in a tenth of a second."""
    del tenth
    try:
        return int(_STATM.read_bytes().split(maxsplit=1)[0]) * _PAGE
    except OSError:
        return None

"""Chat templates are programs of strangers: rendered within bounds, by one clock.

transformers' sandbox keeps them from files and from Python's own attributes, not from
running for ever or filling the memory. And some templates (Llama 3's) write today's
date by `strftime_now`: left to itself, a run that goes on tomorrow would train other
tokens, and one row at midnight another date. So a run renders as of one moment.
"""

import contextlib
import functools
import inspect
import json
import resource
import signal
import string
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path
from typing import Any

from jalign.data.messages import Messages
from jalign.data.rows import RowError

SECONDS = 5.0
MEMORY = 1 << 30  # bytes beyond what the process has
MAX_TEMPLATE, MAX_TEXT = 1 << 20, 4 << 20  # characters
_PAGE = resource.getpagesize()
_STATM = Path("/proc/self/statm")


def render(
    tokenizer: Any,
    messages: Messages,
    args: dict[str, Any],
    *,
    generation_prompt: bool = False,
    continue_final: bool = False,
) -> str:
    """The templated text.

    Raises: RowError with the template's own complaint, or for a text that is too long;
      ValueError for a template that cannot be compiled or takes too long.
    """
    text = apply_template(
        tokenizer,
        messages,
        args,
        tokenize=False,
        add_generation_prompt=generation_prompt,
        continue_final_message=continue_final,
    )
    if len(text) > MAX_TEXT:
        reason = f"writes {len(text)} characters, more than {MAX_TEXT}"
        raise RowError("(chat template)", reason)
    return text


def render_prompt(tokenizer: Any, prompt: Messages, args: dict[str, Any]) -> str:
    """The text up to where the assistant speaks, or goes on speaking."""
    goes_on = prompt[-1]["role"] == "assistant"
    how = {"generation_prompt": not goes_on, "continue_final": goes_on}
    return render(tokenizer, prompt, args, **how)


def apply_template(
    tokenizer: Any, messages: Messages, args: dict[str, Any], **options: Any
) -> Any:
    """`tokenizer.apply_chat_template` within the bounds; raises as `render`."""
    check_template(tokenizer, args)
    with rendering(tokenizer):
        return tokenizer.apply_chat_template(
            messages,
            chat_template=with_clock(template_of(tokenizer, args)),
            **options,
            **args,
        )


def template_of(tokenizer: Any, args: dict[str, Any]) -> str:
    """The template that transformers takes: of several, that for tools, or default."""
    return tokenizer.get_chat_template(None, args.get("tools"))


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
def rendering(tokenizer: Any) -> Iterator[None]:
    """Bounds what the body takes, and says in our words what is wrong in it.

    The time is limited in the main thread, the memory where the system tells (Linux).

    Raises: RowError with the template's own complaint; Uncompiled; ValueError where the
      body takes longer, or more memory: no RowError, since another row would take as
      long again.
    """
    from jinja2 import TemplateSyntaxError

    try:
        with _memory_limit(MEMORY), _time_limit(SECONDS):
            yield
        return
    except TooLong:
        took = f"did not finish within {SECONDS:g} s"
    except MemoryError:
        took = f"needs more than {MEMORY >> 20} MiB of memory"
    except TemplateSyntaxError as error:
        raise Uncompiled(
            f"{tokenizer.name_or_path or 'the tokenizer'}: its chat template cannot be "
            f"compiled: line {error.lineno}: {error.message}; mend it, in "
            "chat_template.jinja or tokenizer_config.json"
        ) from None
    except Exception as error:  # jinja's kinds and whatever a template runs into
        raise RowError("(chat template)", f"refuses the row: {error}") from None
    raise ValueError(
        f"the tokenizer's chat template {took} on one conversation: it is broken or "
        "hostile; use another model's tokenizer, or mend chat_template"
    )


class Uncompiled(ValueError):
    """A template that cannot be compiled, so of no row."""


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


_NOW: ContextVar[datetime | None] = ContextVar("template_clock", default=None)


@contextlib.contextmanager
def fixed_clock(now: datetime) -> Iterator[None]:
    """Inside, every template's `strftime_now` says this moment."""
    token = _NOW.set(now)
    try:
        yield
    finally:
        _NOW.reset(token)


def with_clock(template: str) -> str:
    """The template, with a `strftime_now` of its own where a clock is fixed.

    A macro in front, since transformers hands no functions to a template.
    """
    now = _NOW.get()
    if now is None or "strftime_now" not in template:
        return template
    codes = [flag + letter for flag in ("", "-") for letter in string.ascii_letters]
    table = json.dumps({code: now.strftime("%" + code) for code in codes})
    return _MACRO.replace("TABLE", table) + template


# A format is text, then directives: what follows each per cent sign, "%%" itself being
# an empty part between two of them.
_MACRO = (
    "{%- macro strftime_now(format) -%}{%- set table = TABLE -%}"
    "{%- set state = namespace(text=true) -%}"
    "{%- for part in format.split('%') -%}"
    "{%- if state.text -%}{{ part }}{%- set state.text = false -%}"
    "{%- elif part == '' -%}{{ '%' }}{%- set state.text = true -%}"
    "{%- else -%}{%- set code = part[:2] if part[0] == '-' else part[:1] -%}"
    "{{ table.get(code, '%' ~ code) ~ part[code | length:] }}"
    "{%- endif -%}{%- endfor -%}{%- endmacro -%}"
)

"""The clock of chat templates: a run renders its rows as of one moment.

Some templates (Llama 3's) write today's date by `strftime_now`. Left to itself, a run
that goes on tomorrow would train other tokens, and one row at midnight another date.
"""

import contextlib
import json
import string
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import datetime

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

"""A pytest plugin: CPU-seconds of every test file, its child processes with it.

Seconds of a shared machine say little; CPU-seconds, with those of a fixed piece of work
taken before and after, can be compared. Works under xdist: workers send what they
measured along with each report.
"""

import os
from collections import Counter

import pytest

_SHOWN = 20
_last = 0.0
_files: Counter[str] = Counter()


def _used() -> float:
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])


def pytest_runtest_logstart() -> None:
    global _last
    _last = _used()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    global _last
    report = yield
    now = _used()
    report.user_properties.append(("cpu_seconds", now - _last))
    _last = now
    return report


def pytest_runtest_logreport(report) -> None:
    seconds = dict(report.user_properties).get("cpu_seconds", 0.0)
    _files[report.nodeid.partition("::")[0]] += seconds


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.section(f"{sum(_files.values()):.0f} CPU-seconds, by file")
    for name, seconds in _files.most_common(_SHOWN):
        terminalreporter.write_line(f"{seconds:8.1f}  {name}")

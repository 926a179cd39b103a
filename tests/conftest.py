"""What holds for every test: where it hangs can be asked, and a warning that nobody expected is a failure."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)

_OURS = ("rafsfs", "builder", "p2p", "scheduler", "cli")

# No example has a time limit: how long it takes is the machine's affair. The same examples each time, but for who looks deeper.
settings.register_profile("rafs", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("deep", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "rafs"))


class _Warnings(logging.Handler):
    """Keeps what is logged at WARNING and above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.name} {record.getMessage()}")


@pytest.fixture(autouse=True)
def logged_warnings(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Give the warnings that our code logs in this process; fail the test for any unless it is marked `logs_warnings`."""
    handler = _Warnings()
    loggers = [logging.getLogger(name) for name in _OURS]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield handler.lines
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    if request.node.get_closest_marker("logs_warnings") is None:
        assert handler.lines == [], "unexpected log lines; a test that provokes them is marked `logs_warnings`"

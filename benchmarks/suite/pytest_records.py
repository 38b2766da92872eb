"""A plugin of pytest for the suite: a record for every test as soon as it is through."""

from __future__ import annotations

import os

import pytest

from suite.records import here

# With workers, the process that started them hears of every test as well.
_RECORDS = None if "PYTEST_XDIST_WORKER" in os.environ else here()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Record a test's call, or what kept it from being called."""
    if _RECORDS is None or (report.when != "call" and report.passed):
        return
    record = {"name": report.nodeid, "outcome": report.outcome}
    record["seconds"] = round(report.duration, 2)
    if report.failed or report.skipped:
        record["reason"] = str(report.longrepr)[-600:]
    _RECORDS.add("tests", record)

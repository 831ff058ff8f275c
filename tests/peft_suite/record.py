"""A pytest plugin: what became of each test, and how often our layers and our ops ran, as a JSON file.

The environment says what to do: ``PEFT_SUITE_VERSION``, the PEFT that must be the one imported; ``PEFT_SUITE_RECORD``,
the file to write; ``PEFT_SUITE_MODE``: "unpatched", "patched" (``patch_peft()`` before the tests are imported) or "own"
(this package's tests). It expects pytest-xdist, whose workers run the tests.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Generator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

_calls: Counter[str] = Counter()
_outcomes: dict[str, str] = {}
_totals: Counter[str] = Counter()


def pytest_configure(config: pytest.Config) -> None:
    """In a worker, before anything else imports PEFT."""
    if not hasattr(config, "workerinput"):
        return
    mode, version = os.environ["PEFT_SUITE_MODE"], os.environ["PEFT_SUITE_VERSION"]
    if mode != "own":
        sys.modules["torchao"] = None  # type: ignore[assignment]  # PEFT 0.18 imports what it has since removed
    found = import_module("peft").__version__
    if found != version:
        raise pytest.UsageError(f"expected PEFT {version} on PYTHONPATH, found {found}")
    if mode == "patched":
        # Before svd_layer takes the ops into its own namespace.
        ops = import_module("adalora_kernels.ops.svd_linear")
        _count(ops, "svd_linear")
        _count(ops, "svd_linear_into")
        _count(import_module("adalora_kernels.integrations.svd_layer").FusedSVDLinear, "forward")
        import_module("adalora_kernels.integrations.peft").patch_peft()


def _count(owner: Any, name: str) -> None:
    counted = getattr(owner, name)

    @functools.wraps(counted)
    def counting(*args: Any, **kwargs: Any) -> Any:
        _calls[name] += 1
        return counted(*args, **kwargs)

    setattr(owner, name, counting)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What the controller is to know beside pytest's own report."""
    report = yield
    report.hub, report.calls = _wants_hub(call), dict(_calls)
    _calls.clear()
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A file that can't be collected is wanting the hub or wrong, like a test."""
    report = yield
    report.hub = _wants_hub(report.__dict__.get("call"))
    return report


def _wants_hub(call: pytest.CallInfo[Any] | None) -> bool:
    """Whether what was raised, or what it came from, says that there is no way to the hub."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    # The last is how datasets puts it.
    no_way = (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)
    error = call.excinfo.value if call is not None and call.excinfo is not None else None
    while error is not None and not isinstance(error, no_way):
        error = error.__cause__ or error.__context__
    return error is not None


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Files without their error are nothing to record."""
    if report.failed:
        _outcomes[report.nodeid] = "hub-only" if report.hub else "error"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A test's outcome is that of its call, or of the set-up or tear-down that failed."""
    _totals.update(report.calls)
    if report.failed:
        _outcomes[report.nodeid] = "hub-only" if report.hub else "failed"
    elif hasattr(report, "wasxfail"):
        _outcomes[report.nodeid] = "xfailed" if report.skipped else "xpassed"
    elif report.skipped or report.when == "call":
        _outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The controller has all reports now."""
    if not hasattr(session.config, "workerinput"):
        record = {"outcomes": _outcomes, "calls": _totals}
        Path(os.environ["PEFT_SUITE_RECORD"]).write_text(json.dumps(record, indent=1, sort_keys=True))

"""A pytest plugin for CI: what did not run, or was allowed to fail, is a failure.

What it does: ends the run with exit code 1 if anything was skipped, by whatever means, and
says what and why. What it does not: look at what -k, -m or a path on the command line left
out; whoever typed that knows. tests/run loads it where CI=true.

Invariant: no run with a skipped, xfailed or xpassed test exits 0.
"""

import pytest

_not_run: list[str] = []


def _note(report: pytest.TestReport | pytest.CollectReport) -> None:
    # An xfailed test is skipped and an xpassed one passed, as far as `outcome` tells.
    if report.outcome == "skipped" or hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.outcome
        _not_run.append(f"{report.nodeid}: {getattr(report, 'wasxfail', None) or reason}")


@pytest.hookimpl
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note a test that was skipped."""
    _note(report)


@pytest.hookimpl
def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Note a whole file that was skipped."""
    _note(report)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let a run that would be green by absence fail."""
    if _not_run and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was not run."""
    if _not_run:
        terminalreporter.section("FAILED: in CI nothing may be skipped", red=True, bold=True)
        for line in _not_run:
            terminalreporter.line(line)

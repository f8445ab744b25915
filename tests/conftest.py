"""Settings of the whole suite, and what tests want to be seen at its end."""

from __future__ import annotations

import pytest

_SUMMARY = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("GPU tests (tests/gpu)")
    group.addoption("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: try the GPU tests on gloo ranks")
    group.addoption("--iterations", type=int, default=200, help="calls of the stress test; 10000 for the long run")
    group.addoption("--limit", type=float, default=120.0, help="seconds for a test that sets no limit of its own")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SUMMARY] = []


@pytest.fixture(scope="session")
def summary(pytestconfig: pytest.Config) -> list[str]:
    """Lines that are printed after the run, whether or not its tests pass."""
    return pytestconfig.stash[_SUMMARY]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash[_SUMMARY]:
        terminalreporter.section("what was measured and used")
        for line in lines:
            terminalreporter.write_line(line)

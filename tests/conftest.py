"""Settings of the whole suite, and what tests want to be seen at its end."""

from __future__ import annotations

import os
from typing import Any

import pytest

# Inductor would try its vector code in each process, and in each new cache directory compile it first: 8 s of CPU. What the
# processor says that it has is enough here. Read when torch is imported, by this process and all that it starts.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

# A minute and more each, the longest first. The rest follows, files with slow tests before the others.
_LONGEST = (
    "test_numerics.py",
    "test_gpu_suite.py",
    "test_kernels.py",
    "test_recall.py",
    "test_agreement.py",
    "test_example.py",
)
_SUMMARY = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("GPU tests (tests/gpu)")
    group.addoption("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: try the GPU tests on gloo ranks")
    group.addoption("--iterations", type=int, default=200, help="calls of the stress test; 10000 for the long run")
    group.addoption("--limit", type=float, default=120.0, help="seconds for a test that sets no limit of its own")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SUMMARY] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several workers share the files, long files come first, so that all workers end at about the same time."""
    if not hasattr(config, "workerinput"):
        return
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    places = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: (places.get(item.path.name, len(places)), item.path not in slow))


@pytest.fixture(scope="session")
def summary(pytestconfig: pytest.Config) -> list[str]:
    """Lines that are printed after the run, whether or not its tests pass."""
    return pytestconfig.stash[_SUMMARY]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        session.config.workeroutput["summary"] = session.config.stash[_SUMMARY]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What a worker of pytest-xdist wants to be seen."""
    node.config.stash[_SUMMARY].extend(getattr(node, "workeroutput", {}).get("summary", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash[_SUMMARY]:
        terminalreporter.section("what was measured and used")
        for line in lines:
            terminalreporter.write_line(line)

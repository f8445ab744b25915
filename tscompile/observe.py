"""What happened, as data: log lines that are said once, and the ledger of report rows of this process.

Not for formatting: report.py turns rows into text and JSON.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import replace

from .problem import GroupMemory, Row

log = logging.getLogger("tscompile")

_said: set[str] = set()
_said_lock = threading.Lock()


def once(key: str, message: str, *args: object, level: int = logging.WARNING) -> None:
    """Log `message % args` the first time `key` is seen in this process."""
    with _said_lock:
        if key in _said:
            return
        _said.add(key)
    log.log(level, message, *args)


def forget_said() -> None:
    """Let every message be said again; for tests."""
    with _said_lock:
        _said.clear()


class Ledger:
    """Rows of every graph that this process has started to run, in order of first launch. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: dict[str, Row] = {}
        self._memory: dict[tuple[tuple[int, ...], str], GroupMemory] = {}
        self._outside: dict[str, None] = {}  # in order

    def add(self, rows: Iterable[Row]) -> None:
        """Add rows; a site that is already known keeps its row (the same artifact may start more than once)."""
        with self._lock:
            for row in rows:
                self._rows.setdefault(row.site, row)

    def rows(self) -> list[Row]:
        with self._lock:
            return [replace(row) for row in self._rows.values()]

    def keep_group(self, group: str, code: str, reason: str) -> None:
        """The ranks of `group` run the original ops from now on: its fused rows become kept, with the reason."""
        with self._lock:
            for row in self._rows.values():
                if row.group == group and row.decision == "fused":
                    row.decision, row.code, row.reason = "kept", code, reason

    def keep_site(self, site: str, code: str, reason: str) -> None:
        """Calls of a site run the original ops: its row, if fused, becomes kept, with the reason."""
        with self._lock:
            row = self._rows.get(site)
            if row is not None and row.decision == "fused":
                row.decision, row.code, row.reason = "kept", code, reason
                log.warning("%s: %s", site, reason)

    def holds(self, memory: GroupMemory) -> None:
        """The buffers of a group are there, or have grown."""
        with self._lock:
            self._memory[memory.ranks, memory.provider] = memory

    def memory(self) -> list[GroupMemory]:
        with self._lock:
            return list(self._memory.values())

    def outside(self, texts: Iterable[str]) -> None:
        """Communication that is in no graph: what it is, why, and what to do about it."""
        with self._lock:
            self._outside.update(dict.fromkeys(texts))

    def seen_outside(self) -> list[str]:
        with self._lock:
            return list(self._outside)

    def measured(self, site: str, us: float) -> None:
        """Wall time of one launch of a fused site on this rank; the report shows the last one."""
        row = self._rows.get(site)  # no lock: dict reads are atomic, and this runs at every launch
        if row is not None:
            row.measured_us = us

    def clear(self) -> None:
        with self._lock:
            self._rows.clear()
            self._memory.clear()
            self._outside.clear()


ledger = Ledger()

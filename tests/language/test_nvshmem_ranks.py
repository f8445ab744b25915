"""Every call of `tl.nvshmem`, and what the host issues on streams, on CPU ranks: results, refusals, waits that end."""

from __future__ import annotations

import pytest

import tscompile.language as tl
from tests.worlds import run_world

pytestmark = pytest.mark.slow

ROOM = 1 << 20


def moves(rank: int, size: int) -> list[str]:
    from . import nvshmem_checks as checks

    with tl.SymmetricGroup(nbytes=ROOM) as group:
        return [p for seed, scope in enumerate(checks.k.SCOPES) for p in checks.check_moves(group, scope, 36, seed)]


def the_rest(rank: int, size: int) -> list[str]:
    from . import nvshmem_checks as checks

    problems = []
    with tl.SymmetricGroup(nbytes=ROOM) as group:
        problems += checks.check_signals(group, 20, 1000)
        for count, scope in zip((1, 257, 1024), checks.k.SCOPES, strict=True):
            problems += checks.check_collectives(group, scope, 40, count)
        problems += checks.check_stream(group, 20)
    return problems


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("check", [moves, the_rest])
def test_calls(size: int, check) -> None:
    assert run_world(size, check, timeout_s=250) == [[]] * size

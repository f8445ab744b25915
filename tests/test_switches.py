"""TileScale's switches in the environment: honoured, or said to be in vain; never passed over."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch.distributed as dist

import tscompile.language as tl
from tscompile import observe, switches
from tscompile.errors import HeapError, OptionError
from tscompile.nvshmem import host

NAMES = (switches.NVSHMEM, switches.DISTRIBUTED)


@pytest.fixture(autouse=True)
def nothing_said() -> None:
    observe.forget_said()


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("text", "value"), [("", None), (" ", None), ("1", True), ("ON", True), ("0", False), ("false", False)]
)
def test_values(monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: bool | None) -> None:
    monkeypatch.setenv(name, text)
    assert switches.switch(name) is value
    monkeypatch.delenv(name)
    assert switches.switch(name) is None


@pytest.mark.parametrize("name", NAMES)
def test_a_value_that_is_none(monkeypatch: pytest.MonkeyPatch, alone: None, name: str) -> None:
    """Before anything is exchanged."""
    monkeypatch.setenv(name, "maybe")
    with pytest.raises(OptionError, match=f"{name} = 'maybe' is not valid: allowed: 1, true"):
        tl.SymmetricGroup(nbytes=4096)


def test_without_nvshmem(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rank posts then, so that all ranks do without: tests/nvshmem/test_world.py has the rest of that way."""
    monkeypatch.setenv(switches.NVSHMEM, "0")
    host.load.cache_clear()  # who has it already keeps it
    with pytest.raises(HeapError, match="TILELANG_USE_NVSHMEM asks to do without it: unset it, or set it to 1"):
        host.load()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            switches.NVSHMEM,
            "1",
            "TILELANG_USE_NVSHMEM=1 has no effect on ranks (0,): CPU ranks share POSIX memory instead",
        ),
        (switches.DISTRIBUTED, "0", "TILELANG_USE_DISTRIBUTED=0 has no effect: this program makes symmetric memory"),
        (switches.NVSHMEM, "0", ""),
        (switches.DISTRIBUTED, "1", ""),
    ],
)
def test_what_is_in_vain(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, alone: None, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING, "tscompile"), tl.SymmetricGroup(nbytes=4096) as group:
        assert group.provider == "shm"
    assert [record.getMessage() for record in caplog.records] == ([said] if said else [])

"""The host's side of `TslContext` in cuda.h and cpu.h: what a kernel knows of its group, as one int64 tensor.

One tensor per group and slot, written once and passed to every kernel as a `T.Tensor((WORDS,), "int64")`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MAX_RANKS = 8

# Offsets in words of 8 bytes. tests/language/test_context.py compares them with what a C++ compiler makes of the struct.
RANK = 0
SIZE = 1
TIMEOUT_NS = 2
EPOCH_CELL = 3
ABORT_WORD = 4
ABORT_OFFSET = 5
RECORD = 6
TEAM = 7
DATA = 8
FLAGS = DATA + MAX_RANKS
CONTROL = FLAGS + MAX_RANKS
WORDS = CONTROL + MAX_RANKS

RECORD_WORDS = 8
"""uint64 words at the record address: 1 + the rank that gave up, peer, site, expected, seen, and three that are free."""

TEAM_WORDS = 2 + MAX_RANKS
"""uint64 words of TslTeam: how often the ranks met, the PEs, and a flag for each rank."""

REFUSED = 0xFFFFFFFF
"""The site in the record of a call that was refused; `expected` says why, as a key of REFUSALS."""

REFUSALS = {
    1: "the context has no team: pass that of a SymmetricGroup",
    2: "NVSHMEM cannot address the memory of the group: SymmetricGroup.nvshmem() says why",
    3: "the kernel's module was loaded without NVSHMEM: import tscompile.language before the first TileLang kernel of the "
    "process is launched, and compile with tl.dialect(..., nvshmem=...)",
    4: "there is no such PE in the group",
}


def _signed(word: int) -> int:
    """Addresses use all 64 bits; a tensor's words are signed."""
    return word - (1 << 64) if word >= 1 << 63 else word


def pack_pes(pes: Sequence[int]) -> int:
    """The word of TslTeam that says which PE each rank is, a byte each: 1 + PE, as a signed 64-bit number.

    Raises:
        ValueError: more ranks or higher PEs than the word holds.
    """
    if len(pes) > MAX_RANKS or not all(0 <= pe < 255 for pe in pes):
        raise ValueError(f"PEs {list(pes)}: at most {MAX_RANKS}, from 0 to 254")
    return _signed(sum((1 + pe) << 8 * rank for rank, pe in enumerate(pes)))


def fill(
    tensor: torch.Tensor,
    *,
    rank: int,
    size: int,
    timeout_ns: int,
    epoch_cell: int,
    abort_word: int,
    abort_offset: int,
    record: int,
    data: Sequence[int],
    flags: Sequence[int],
    control: Sequence[int],
    team: int = 0,
) -> torch.Tensor:
    """Write a context into a CPU tensor; copy it to the device afterwards if the kernels run there.

    Args:
        tensor: int64 `[WORDS]`, contiguous, on the CPU.
        rank: this rank's number in the group.
        size: ranks of the group, at most `MAX_RANKS`.
        timeout_ns: how long a wait may take before it gives up, nanoseconds.
        epoch_cell: address of a local uint32 that is added to the epoch a launch passes.
        abort_word: address of a local uint32 in this rank's control block; not 0 ends every wait.
        abort_offset: of that word from a rank's control base, bytes, the same on every rank.
        record: address of `RECORD_WORDS` uint64, mapped on the host, where a wait that gives up says why.
        data: per rank, the base of the slot, as mapped here.
        flags: per rank, the base of the slot's flags, as mapped here.
        control: per rank, the base of the control block, as mapped here.
        team: address of TEAM_WORDS uint64 in this rank's control block, at the same offset in every rank's; 0 if there is none, and
            then no call of `tl.nvshmem` can be made.

    Returns:
        `tensor`.

    Raises:
        ValueError: the tensor is no int64 `[WORDS]` on the CPU, or numbers do not fit together.
    """
    if str(tensor.dtype) != "torch.int64" or tuple(tensor.shape) != (WORDS,) or tensor.device.type != "cpu":
        raise ValueError(f"a context is an int64 tensor of {WORDS} words on the CPU, not {tensor.dtype} {tensor.shape}")
    if not 0 <= rank < size <= MAX_RANKS:
        raise ValueError(f"rank {rank} of {size}: a group has 1 to {MAX_RANKS} ranks")
    if timeout_ns <= 0:
        raise ValueError(f"timeout_ns is {timeout_ns}: a wait needs a positive bound")
    words = [0] * WORDS
    words[RANK], words[SIZE], words[TIMEOUT_NS] = rank, size, timeout_ns
    words[EPOCH_CELL], words[ABORT_WORD], words[ABORT_OFFSET] = epoch_cell, abort_word, abort_offset
    words[RECORD], words[TEAM] = record, team
    for start, addresses in ((DATA, data), (FLAGS, flags), (CONTROL, control)):
        if len(addresses) != size:
            raise ValueError(f"{len(addresses)} addresses for {size} ranks")
        words[start : start + size] = addresses
    for index, word in enumerate(words):
        tensor[index] = _signed(word)
    return tensor

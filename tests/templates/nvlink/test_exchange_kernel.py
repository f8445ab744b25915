"""The kernel of exchanges compiled for sm_90a: its registers, what it reads by which path, and what stands around flags. No GPU."""

from __future__ import annotations

import re
from functools import cache
from itertools import groupby

import torch

import tscompile.language as tl
from tests.language.ptx import read_non_coherently
from tscompile.problem import Delivery
from tscompile.templates.nvlink.kernels.config import GRID_DIMS, MAX_LEGS, MAX_TARGETS, SMS, UNIT_WORDS
from tscompile.templates.nvlink.kernels.exchange import THREADS, exchange_kernel
from tscompile.templates.nvlink.kernels.gemm import PASS_CONFIGS
from tscompile.templates.nvlink.legs import batches_of, rows_of, worded

from .host_code import kernel_text

REGISTERS = 65536 // THREADS // 8 * 8  # of a thread, with one CTA on an SM
EVENTS = {
    "group": r"bar\.sync 11, 256;",
    "other group": r"bar\.sync 12, 256;",
    "CTA": r"bar\.sync\s+0;",
    "last": r"bar\.sync 9, 256;",
    "claim": r"atom\.global\.add\.u32",
    "fence": r"fence\.acq_rel\.sys;",
    "flag": r"st\.relaxed\.sys",
    "look": r"ld\.acquire\.sys\.global\.u32",
    "time": r"%globaltimer",
    "aborted": r"ld\.relaxed\.sys",
    "abort": r"atom\.sys\.exch",
    "load": r"ld\.global\.L1::no_allocate\.v4\.u32",
    "store": r"st\.global\.v4\.u32",
    "acknowledge": r"st\.release\.sys",
}


@cache
def compiled() -> tl.CudaArtifact:
    return tl.compile_cuda(exchange_kernel(SMS), pass_configs=PASS_CONFIGS)


def events() -> list[str]:
    """What the kernel does, as it follows in the text; of loads and stores of words, how many follow one another."""
    names = list(EVENTS)
    found = re.finditer("|".join(f"({pattern})" for pattern in EVENTS.values()), compiled().ptx)
    runs = ((name, len(list(run))) for name, run in groupby(names[(match.lastindex or 0) - 1] for match in found))
    return [f"{count} {name}s" if name in ("load", "store") else name for name, count in runs]


def test_resources() -> None:
    artifact = compiled()
    assert artifact.cubin[:4] == b"\x7fELF"
    assert artifact.spill_bytes == 0 and artifact.stack_bytes == 0
    assert 0 < artifact.registers <= REGISTERS == 128
    assert "call.uni" not in artifact.ptx and ".func" not in artifact.ptx
    assert "ptxas info" in artifact.log and "warning" not in artifact.log, artifact.log
    assert f"__launch_bounds__({THREADS}, 1)" in artifact.source


def test_only_the_table_is_read_by_the_read_only_path() -> None:
    """Inputs, too, may be written by another kernel between launches of a graph; the slot is written by peers meanwhile."""
    assert read_non_coherently(compiled(), addresses=r"\*|int64_t") == {"table"}


def test_a_batch_is_sent_before_its_flag() -> None:
    """All of a group's stores, its barrier, one fence at system scope, the flag: nothing in between, and no other flag."""
    found = events()
    begin = found.index("8 loads")
    assert found[begin - 1 : begin + 6] == ["claim", "8 loads", "8 stores", "group", "fence", "flag", "group"]
    assert found.count("fence") == 1
    # The only other relaxed stores end the waits of a group that has failed.
    assert [found[i - 1] for i, event in enumerate(found) if event == "flag"] == ["fence", "abort"]
    assert found.index("claim") < found.index("group") < begin
    assert found.count("acknowledge") == 1 and found[-1] == "acknowledge"


def test_waits_are_bounded_and_stand_before_what_is_read() -> None:
    """A wait looks, and looks again until the time is up or the group has failed; then the whole group meets, and reads."""
    found = events()
    begin = found.index("look")
    assert found[begin : begin + 7] == ["look", "time", "look", "aborted", "time", "abort", "flag"]
    assert found[begin + 7 : begin + 13] == ["group", "other group", "8 loads", "8 stores", "group", "other group"]
    assert found.count("look") == 2  # there is no other wait


def test_the_end_of_a_launch() -> None:
    """All threads meet before the last CTA resets the counters; an aborted one stores NaN, and looks for that once more."""
    found = events()
    end = len(found) - 1 - found[::-1].index("CTA")
    assert found[end:] == ["CTA", "last", "claim", "last", "aborted", "8 stores", "acknowledge"]
    assert found.count("CTA") == 2  # and once behind the addresses
    assert found.index("CTA") < found.index("claim")


def test_words_are_moved_without_divisions() -> None:
    """A push divides by multiplication; the GPU would take some thirty instructions for each dim of each word."""
    ptx = compiled().ptx
    loads = [match.start() for match in re.finditer(EVENTS["load"], ptx)]
    loop = ptx[ptx.rindex("\n$L__", 0, loads[0]) : loads[7]]
    assert loop.count("mul.hi.u32") >= GRID_DIMS and not re.search(r"\b(div|rem)\.", loop)


def test_the_host_and_the_device_count_alike() -> None:
    text = kernel_text("exchange.h")
    numbers = {name: int(number) for name, number in re.findall(r"(TSX_\w+) = (\d+)[,} ]", text)}
    assert (numbers["TSX_DIMS"], numbers["TSX_LOADS"] * 32) == (GRID_DIMS, UNIT_WORDS)
    assert 2 * numbers["TSX_GROUP"] == THREADS
    (addresses,) = re.findall(r"__shared__ uint64_t addresses\[(\d+)\]", text)
    assert int(addresses) == MAX_LEGS + MAX_TARGETS and "tsx_addresses()[8 + t]" in text and MAX_LEGS == 8
    # A row of the table: five words, and six arrays of dims... as the enumeration has them.
    fields = re.search(r"enum \{ TSX_LEG_BATCH,(.*?)TSX_ROW = ", text, re.DOTALL)
    assert fields
    names = re.findall(r"TSX_\w+", "TSX_LEG_BATCH " + re.sub(r"= .*?(?=[,\n]|$)", "", fields[1]))
    arrays = ["TSX_SIZES", "TSX_STRIDES", "TSX_FIXED", "TSX_MULTIPLIERS", "TSX_SHIFTS"]
    assert names[5:] == arrays
    x = torch.empty(2, 5, 8, dtype=torch.bfloat16, device="meta")
    legs = worded([Delivery(0, (0, 1, 2))], [1], [x])
    assert legs is not None
    assert {len(row) for row in rows_of(legs, batches_of([5], 2))} == {5 + len(arrays) * GRID_DIMS}

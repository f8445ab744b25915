"""Barriers on words of a symmetric tensor, timing of kernels that wait for peers, and what the driver says of the links.

torchrun --nproc-per-node 2 --local-ranks-filter 0 -m pytest tests/gpu/test_host.py -x -q -s
"""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch

import tscompile.language as tl
from tests.gpu.conftest import World
from tests.language import rank_kernels
from tscompile.language.compile import parse

ROUNDS = 1000


@pytest.fixture(scope="module")
def memory(world: World) -> Iterator[tl.SymmetricGroup]:
    with tl.SymmetricGroup(nbytes=16 << 20, device=world.device, timeout_s=20.0) as group:
        yield group


def test_meetings_and_their_time(world: World, memory: tl.SymmetricGroup) -> None:
    d = tl.dialect("cuda" if world.cuda else "cpu")
    meet = d.compile(parse(lambda: rank_kernels.meeting_blocks(d, world.size)))
    world.store.set(f"host/{world.rank}", "")
    world.store.wait([f"host/{rank}" for rank in range(world.size)], timedelta(seconds=100))  # all have compiled
    words, cells = memory.tensor((64,), torch.int32), memory.tensor((world.size,), torch.int32)
    out, epochs, rounds = torch.zeros(2, dtype=torch.int32, device=world.device), itertools.count(1, 2), ROUNDS
    if not world.cuda:
        rounds = 20
    milliseconds = tl.perf_fn(
        lambda: meet(memory.context, words, cells, next(epochs), out), memory, warmup=5, iters=rounds - 5
    )
    assert out.tolist() == [0, 2 * rounds]
    tl.dist_print(memory, f"two meetings of {world.size} ranks: {1000 * milliseconds:.1f} us")


@pytest.mark.gpu
def test_links(world: World, memory: tl.SymmetricGroup) -> None:
    """As nvidia-smi prints them, where it shows the GPUs that torch sees."""
    for capability, found in (("n", tl.has_fullmesh_nvlink()), ("a", tl.supports_p2p_native_atomic())):
        done = subprocess.run(["nvidia-smi", "topo", "-p2p", capability], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        rows = [line.split()[1:] for line in done.stdout.splitlines() if re.match(r"\s*GPU\d+\s+(X|OK|\w+)\s", line)]
        matrix = [row for row in rows if "X" in row]
        tl.dist_print(memory, f"{capability}: {found}, nvidia-smi: {matrix}", ranks=[0])
        if len(matrix) == torch.cuda.device_count():
            assert found == all(cell in ("OK", "X") for row in matrix for cell in row)
    if tl.has_fullmesh_nvlink():
        pairs = itertools.permutations(range(torch.cuda.device_count()), 2)
        assert all(torch.cuda.can_device_access_peer(*pair) for pair in pairs)

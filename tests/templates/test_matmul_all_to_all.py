"""matmul_all_to_all on real ranks: whole programs against float64, downgrade, verification, and ranks that stay away."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.cases import Case, manifest, projected, row
from tests.numerics_worker import Outcome, run_cases
from tests.test_numerics import FUSE_ALL
from tests.worlds import run_world
from tscompile.errors import PeerError
from tscompile.fx_passes.matmul_all_to_all import KIND, reference
from tscompile.lowering import runtime
from tscompile.testing import run_ranks

pytestmark = pytest.mark.slow
OPTIONS = {**FUSE_ALL, "tilescale.disable": "all_to_all_attention,all_to_all_matmul"}
PROGRAMS = {
    2: [
        (torch.bfloat16, "d5_ulysses_fusedqkv"),
        (torch.bfloat16, "d1_ulysses_deepspeed"),
        (torch.float32, "d10_ulysses_dynamic"),
    ],
    4: [
        (torch.float32, "d2_ulysses_yunchang_gqa"),
        (torch.float32, "d11_ulysses_separate"),
        (torch.bfloat16, "d2_ulysses_yunchang"),
        (torch.float32, "d9_ulysses_checkpoint"),
    ],
}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("world", PROGRAMS)
def test_programs_against_float64(world: int) -> None:
    """Outputs and gradients: at most twice eager's error, and since the matmuls are eager's, its bits."""
    ranks: list[list[Outcome]] = run_ranks(world, run_cases, PROGRAMS[world], OPTIONS, timeout_s=380)
    for outcomes in ranks:
        for (dtype, name), outcome in zip(PROGRAMS[world], outcomes, strict=True):
            assert not outcome.failure, outcome.failure
            assert outcome.errors and not outcome.wrong(dtype), (name, outcome.wrong(dtype))
            assert outcome.equal, name
            for phase in ("forward", "backward"):
                assert f"fused {phase} {KIND} fused" in outcome.decisions, (name, outcome.decisions)


def launch(case: Case, rank: int, name: str) -> bool:
    """Run a case on this rank, and check it; whether the original ops ran."""
    originals = []

    def original() -> list[torch.Tensor]:
        originals.append(True)
        return reference(case.plan, name, *case.args[rank])

    case.check(rank, runtime.launch(case.plan, name, case.args[rank], original))
    return bool(originals)


def life(rank: int, size: int) -> str:
    assert dist.group.WORLD is not None
    name = dist.group.WORLD.group_name
    cases = [projected(size, seed, "float32", parts=(2, 1), spelling=seed % 3, bias=True) for seed in range(4)]
    assert all(launch(case, rank, name) for case in cases), "no graph has started: the original ops"
    rows = [row(name, case.plan.site) for case in cases]
    runtime.begin(manifest({name: 1}, scratch_bytes=64, rows=rows, timeout_s=2.0, verify=True))
    # The arena grows, and the original ops run beside the fused one, whose results must be theirs.
    assert all(launch(case, rank, name) for case in cases)
    dist.barrier()
    if rank == size - 1:
        time.sleep(4.5)
        return "stayed away"
    start = time.monotonic()
    with pytest.raises(PeerError) as caught:
        launch(cases[0], rank, name)
    assert time.monotonic() - start < 4.0
    return str(caught.value)


@pytest.mark.parametrize("size", [2, 3])
def test_original_ops_then_fused_ones_then_a_rank_that_stays_away(size: int) -> None:
    said: list[Any] = run_world(size, life, timeout_s=120)
    assert all(f"rank {size - 1} did not answer within 2 s" in text for text in said[:-1]), said

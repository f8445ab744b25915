"""The programs of the GPU tests on two CPU ranks: the ops fuse there too, and the tests themselves are tried."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests import fused_programs, fused_runs
from tests.compat import permuted_group
from tscompile.testing import run_ranks


def run_all(dtype: torch.dtype) -> dict[str, str]:
    """Every program on the world, and one of each kind on a permuted group: name -> what was wrong."""
    failures = {}
    permuted = permuted_group([1, 0])
    for name, program in fused_programs.PROGRAMS.items():
        groups = {"": dist.group.WORLD}
        if name.endswith("x @ w"):
            groups["permuted "] = permuted
        for prefix, group in groups.items():
            try:
                fused_runs.run(program, group, dtype, torch.device("cpu"), fused_programs.TINY)
            except Exception as error:
                failures[prefix + name] = f"{type(error).__name__}: {error}"
    return failures


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_programs_on_two_cpu_ranks(dtype: torch.dtype) -> None:
    assert run_ranks(2, run_all, dtype, timeout_s=240) == [{}, {}]


def test_groups_fit_into_their_world() -> None:
    assert fused_runs.subgroups(2) == [[0, 1], [1, 0]]
    assert len(fused_runs.subgroups(4)) == 6

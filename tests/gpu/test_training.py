"""A training loop as users have it: tensor parallelism is fused, FSDP2 shards along the other mesh dimension, a DDP module runs beside.

NCCL's kernels and ours share the GPUs here and start in orders that nobody fixes: --iterations 10000 for the long run. Two ranks have
one dimension only: there FSDP2 wraps without sharding, and the DDP module shares the ranks of tensor parallelism.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tscompile
from benchmarks import llama
from tests.gpu.conftest import World
from tscompile.backend import tilescale
from tscompile.observe import ledger

SMALL = llama.Config("small", dim=512, heads=8, kv_heads=4, hidden=1536, layers=1, length=1024)
TINY = llama.Config("tiny", dim=64, heads=4, kv_heads=2, hidden=96, layers=1, length=32)
COMPARED = 10  # steps until which rounding has not yet driven two runs apart


class Training:
    """Model, neighbour and optimiser; every call with the same seed is the same training."""

    def __init__(self, world: World, mesh: DeviceMesh, compiler: dict[str, Any]) -> None:
        config, dtype = (SMALL, torch.bfloat16) if world.cuda else (TINY, torch.float32)
        self.model = llama.build(config, mesh["tp"], dtype)
        for block in self.model.blocks:
            block.compile(dynamic=False, **compiler)
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(self.model, mesh=mesh["dp"])
        torch.manual_seed(3)
        neighbour = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)).to(world.device)
        devices = [world.device] if world.cuda else None
        beside = mesh["dp"].get_group() if mesh["dp"].size() > 1 else dist.group.WORLD
        self.neighbour = DistributedDataParallel(neighbour, devices, process_group=beside)
        torch.manual_seed(100 + world.rank)
        shape = (2, config.length // mesh["tp"].size(), config.dim)
        self.inputs = [torch.randn(shape, device=world.device, dtype=dtype) for _ in range(4)]
        self.extra = torch.randn(64, 256, device=world.device)
        # Steps that bfloat16 weights can take; and meshes of both kinds do not go into one optimiser.
        self.optimizers = [torch.optim.Adam(module.parameters(), lr=1e-4) for module in (self.model, self.neighbour)]

    def step(self, number: int) -> Tensor:
        """Loss of one step; the neighbour's all_reduce runs during the model's backward."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss = llama.loss_of(self.model(self.inputs[number % len(self.inputs)]))
        self.neighbour(self.extra).square().mean().backward()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()


@pytest.mark.timeout(1500)
def test_fsdp_and_ddp_beside(world: World, pytestconfig: pytest.Config) -> None:
    if world.size % 2:
        pytest.skip(f"needs groups of two ranks, there are {world.size} ranks")
    replicas = 2 if world.size > 2 else 1
    mesh = init_device_mesh(world.device.type, (replicas, world.size // replicas), mesh_dim_names=("dp", "tp"))
    plain = Training(world, mesh, {"backend": "eager"})
    wanted = torch.stack([plain.step(number) for number in range(COMPARED)])
    del plain
    torch._dynamo.reset()
    ledger.clear()
    fused = Training(world, mesh, {"backend": tilescale, "options": {"tilescale.fuse": "always"}})
    steps = pytestconfig.getoption("--iterations")
    losses = torch.zeros(max(steps, COMPARED), device=world.device)
    for number in range(len(losses)):
        losses[number] = fused.step(number)
        if number % 1000 == 999:
            world.say(f"{number + 1} steps, loss {losses[number].item():.4f}")
    assert losses.isfinite().all()
    torch.testing.assert_close(losses[:COMPARED], wanted.float(), rtol=0.02, atol=0.0)
    assert losses[-4:].mean() < losses[:4].mean()  # it has learnt something
    rows = tscompile.reports().to_json()["rows"]
    assert sum(len(row["collectives"]) for row in rows if row["decision"] == "fused") >= 8 * len(fused.model.blocks)
    # Every replica of a sharded parameter's group took the same steps.
    norms = torch.stack([p.to_local().float().norm() for p in fused.model.parameters() if p.dim() == 1])  # type: ignore[attr-defined]
    gathered = [torch.empty_like(norms) for _ in range(mesh["tp"].size())]
    dist.all_gather(gathered, norms, group=mesh["tp"].get_group())
    assert all(torch.equal(norms, other) for other in gathered)

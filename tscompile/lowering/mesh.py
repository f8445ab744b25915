"""Launch of an op that gathers in two groups at once: one operand along a row of the mesh, the other along a column.

Where ops are enqueued and cannot be taken back, the whole mesh decides whether they run (mesh_state.py). Otherwise each group keeps its
own heap, epochs, votes and refusals; nothing is agreed on between the groups. So every combination occurs: one exchange through shared
memory and the other by the group's own collective, on some ranks of the mesh and not on others. Why no rank waits for ever all the
same: docs/dev/design.md, "Ops of two groups".
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from ..nvshmem.heap import Channel, DowngradedError
from ..observe import ledger
from ..problem import Plan
from ..templates import find_template
from ..templates.mesh_gemm import Posted
from . import runtime
from .group import GroupState

_c10d = torch.ops._c10d_functional


class _Exchange:
    """One operand's gather within one launch, through its group's heap or by the group's collective."""

    def __init__(self, state: GroupState | None, name: str, shard: Tensor) -> None:
        self.state = state
        self.name = name
        self.shard = shard
        self.posted: Posted | None = None

    def post(self, plan: Plan, dtype: torch.dtype, keep: bool) -> None:
        """Put the shard where the peers find it, unless the group runs the original ops. Waits for no peer's op."""
        if self.state is None:
            return
        try:
            channel = self.state.enter(plan.site, self.shard.numel() * dtype.itemsize)
        except DowngradedError as stop:
            self.state.step_back(stop)
            return
        if channel is not None:
            assert isinstance(channel, Channel)
            self.posted = Posted(channel, self.shard, dtype, keep)

    def settle(self) -> None:
        """Wait for every peer; if the ranks run the original ops of this epoch, forget what was posted."""
        if self.posted is None or self.state is None:
            return
        try:
            self.posted.settle()
        except DowngradedError as stop:
            self.posted = None
            self.state.step_back(stop)

    def gathered(self, verify: bool) -> Tensor:
        """[R, P, Q]. With `verify` by the group's collective in any case: the peers that could run fused compare with it."""
        if self.posted is not None and not verify:
            return torch.stack(self.posted.settle())
        return self.collective()

    def collective(self) -> Tensor:
        ranks = int(c10d._resolve_process_group(self.name).size())  # type: ignore[arg-type, unused-ignore]
        result: Tensor = _c10d.wait_tensor(_c10d.all_gather_into_tensor(self.shard.contiguous(), ranks, self.name))
        return result.view(ranks, *self.shard.shape)


def launch(plan: Plan, group_name: str, args: tuple[Any, ...], reference: Callable[..., list[Tensor]]) -> list[Tensor]:
    """Run a fused op of two groups; as runtime.launch.

    Args:
        args: lhs, rhs, ..., name of the right operand's group.
        reference: the op from both operands as their groups' collectives gather them, [R, P, Q].
    """
    world = runtime.current_world()
    names = (group_name, args[-1])
    mesh = world.meshes.get(names)
    if mesh is not None:
        left, right = (world.by_name[name, plan.executor] for name in names)
        outputs, fused = mesh.launch(plan, left, right, args, reference)
        if fused and plan.site in world.verified:
            runtime.compare(plan, outputs, reference())
        return outputs
    states = [world.by_name.get((name, plan.executor)) for name in names]
    exchanges = [_Exchange(*each) for each in zip(states, names, args[:2], strict=True)]
    start = time.perf_counter()
    verify = plan.site in world.verified
    with ExitStack() as locks:
        # Two threads of one process may come with the groups in another order.
        for live in sorted((state for state in states if state is not None), key=lambda state: state.ranks):
            locks.enter_context(live.lock)
        try:
            with torch.no_grad():
                outputs, fused = _run(plan, exchanges, args, reference, verify)
        except BaseException as error:
            # The peers in either group wait for a rank that has left.
            for state in states:
                if state is not None and state.heap is not None and state.refusal is None:
                    state.break_off(plan.site, error)
            raise
    if fused and verify:
        runtime.compare(plan, outputs, reference(*(exchange.collective() for exchange in exchanges)))
    if any(state is not None for state in states):
        ledger.measured(plan.site, (time.perf_counter() - start) * 1e6)
    return outputs


def _run(
    plan: Plan,
    exchanges: list[_Exchange],
    args: tuple[Any, ...],
    reference: Callable[..., list[Tensor]],
    verify: bool,
) -> tuple[list[Tensor], bool]:
    """The op's outputs, and whether both operands came through memory."""
    dtype: torch.dtype = getattr(torch, plan.dtype)
    # Both shards are out before this rank waits for any.
    for exchange, keep in zip(exchanges, (plan.return_gathered, plan.return_second), strict=True):
        exchange.post(plan, dtype, keep)
    left, right = exchanges
    template = find_template(plan.kind, plan.executor)
    if template is not None and left.posted is not None and right.posted is not None:
        try:
            return template.run((left.posted, right.posted), plan, *args), True
        except DowngradedError:
            pass  # of which group, settling finds out
    for exchange in exchanges:
        exchange.settle()
    _tell(plan.site, exchanges)
    return reference(*[exchange.gathered(verify) for exchange in exchanges]), False


def _tell(site: str, exchanges: list[_Exchange]) -> None:
    """Say in the report that the site runs without one of its groups."""
    for exchange in exchanges:
        refusal = exchange.state.refusal if exchange.state is not None else None
        if refusal is not None:
            ledger.keep_site(site, refusal.code, refusal.reason)

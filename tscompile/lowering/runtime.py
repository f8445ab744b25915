"""Start of a graph and launch of a fused op at run time.

Not for planning: the plan and the manifest come from the compiled artifact, and this module only looks at what is true now: which
process group is there, what its ranks have agreed on, and whether it still works.
"""

from __future__ import annotations

import json
import os
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from ..errors import TscompileError
from ..observe import ledger
from ..problem import Plan, Row
from . import executors
from .group import Election, GroupState, Stake
from .mesh_state import MeshState
from .vote import BallotBox

MANIFEST_VERSION = 1
_NO_REAL_PEERS = ("fake", "threaded")  # backends whose ranks are not processes
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


class _World:
    """What the runtime knows in one life of the default process group."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = None if group is None else weakref.ref(group)
        self.begun: dict[str, tuple[GroupState, ...]] = {}  # manifest -> groups that it concerns
        self.verified: set[str] = set()  # sites
        self.states: dict[tuple[tuple[int, ...], str], GroupState] = {}
        self.by_name: dict[tuple[str, str], GroupState] = {}  # (group's name, executor's name)
        self.meshes: dict[tuple[str, str], MeshState] = {}  # by the names of their groups, in either order
        self.boxes: dict[tuple[int, ...], BallotBox] = {}  # of meshes


_world = _World(None)


def current_world() -> _World:
    """The state of this life of the process group: destroy_process_group and init_process_group start a new one."""
    global _world
    group = distributed_c10d.GroupMember.WORLD
    known = None if _world.group is None else _world.group()
    if group is not known or (group is None and _world.group is not None):
        _world = _World(group)
    return _world


def _forget() -> None:
    """Drop all state. A forked child must not write into the memory of its parent's peers: it runs the original ops."""
    global _world
    _world = _World(None)


os.register_at_fork(after_in_child=_forget)


def _timeout_s(group: dist.ProcessGroup, device: str) -> float:
    """The process group's own time-out in seconds."""
    try:
        timeout = group._get_backend(torch.device(device)).options._timeout
    except (AttributeError, RuntimeError):
        timeout = distributed_c10d.default_pg_timeout
    return float(timeout.total_seconds())


def _find_state(world: _World, name: str, executor: str) -> GroupState | None:
    """State of the group of that name; None if its ranks cannot share memory because they are not other processes."""
    if (name, executor) in world.by_name:
        return world.by_name[name, executor]
    group = distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type, unused-ignore]
    ranks = tuple(dist.get_process_group_ranks(group))
    if len(ranks) < 2 or dist.get_backend(group) in _NO_REAL_PEERS:
        return None
    state = world.states.get((ranks, executor))
    if state is None:
        timeout_s = _timeout_s(group, "cuda" if executor == "nvlink" else "cpu")
        state = GroupState(ranks, dist.get_rank(), timeout_s, executors.make_executor(executor))
        world.states[ranks, executor] = state
    state.names.add(name)
    world.by_name[name, executor] = state
    return state


def begin(manifest: str) -> None:
    """Start of a graph: the first time, register its report rows and vote with the peers on running it fused.

    Args:
        manifest: JSON `{"version": 1, "graph": str,
            "groups": {name: {"executor": str, "digest": str, "sites": int, "scratch_bytes": int}},
            "meshes": [{"groups": [name, name], "sites": [str]}], "rows": [Row as dict],
            "runtime": {"timeout_s": float | None, "heap_bytes": int | None, "verify": bool}}`;
        `sites` counts fused sites, `scratch_bytes` is the largest need of one of them; `meshes` are the pairs of groups that an op
        joins, where ops cannot be taken back.

    Raises:
        TscompileError: the manifest was written by another version.
    """
    world = current_world()
    known = world.begun.get(manifest)
    if known is not None:
        for state in known:
            state.start_again()
        return
    parsed: dict[str, Any] = json.loads(manifest)
    if parsed.get("version") != MANIFEST_VERSION:
        raise TscompileError(
            f"compiled artifact carries manifest version {parsed.get('version')}, this tscompile reads {MANIFEST_VERSION}: "
            "clear the Inductor cache (TORCHINDUCTOR_CACHE_DIR) and run again"
        )
    ledger.add(Row(**row) for row in parsed["rows"])
    options = parsed.get("runtime", {})
    if options.get("verify"):
        world.verified.update(row["site"] for row in parsed["rows"] if row["decision"] == "fused")
    if world.group is not None:
        _vote(world, parsed["groups"], parsed.get("meshes", []), options)
    states = (world.by_name.get((name, entry["executor"])) for name, entry in parsed["groups"].items())
    world.begun[manifest] = tuple(dict.fromkeys(state for state in states if state is not None))


def _find_meshes(world: _World, entries: list[dict[str, Any]], groups: dict[str, dict[str, Any]]) -> list[MeshState]:
    """The meshes of a graph, each once: several names may denote the same ranks."""
    found: list[MeshState] = []
    for entry in entries:
        first, second = entry["groups"]
        states = [_find_state(world, name, groups[name]["executor"]) for name in (first, second)]
        left, right = states
        if left is None or right is None:
            continue
        known = (mesh for mesh in world.meshes.values() if set(mesh.states) == {left, right})
        mesh = next(known, None) or MeshState((left, right), world.boxes)
        world.meshes[first, second] = world.meshes[second, first] = mesh
        mesh.add(entry["sites"])
        if mesh not in found:
            found.append(mesh)
    return found


def _vote(
    world: _World, groups: dict[str, dict[str, Any]], meshes: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    at_stake: dict[GroupState, list[dict[str, Any]]] = {}
    for name, entry in groups.items():
        state = _find_state(world, name, entry["executor"])
        if state is not None:
            at_stake.setdefault(state, []).append(entry)  # several names may mean the same ranks
        elif entry["sites"]:
            ledger.keep_group(name, "no-peers", "the group has no other processes: there is nothing to overlap")
    digests = {state: "+".join(entry["digest"] for entry in entries) for state, entries in at_stake.items()}
    joined = _find_meshes(world, meshes, groups)
    unsettled = [mesh for mesh in joined if not mesh.agreed_on(tuple(digests[state] for state in mesh.states))]
    elections: dict[GroupState, Election] = {}
    try:
        for state, entries in at_stake.items():
            stake = Stake(
                digest=digests[state],
                sites=sum(entry["sites"] for entry in entries),
                scratch_bytes=max(entry["scratch_bytes"] for entry in entries),
                timeout_s=options.get("timeout_s"),
                heap_bytes=options.get("heap_bytes"),
                verify=bool(options.get("verify")),
                partners=tuple(
                    next(other.ranks for other in mesh.states if other is not state)
                    for mesh in joined
                    if state in mesh.states
                ),
            )
            election = state.open_vote(stake, again=any(state in mesh.states for mesh in unsettled))
            if election is not None:
                elections[state] = election
        # Stage by stage over all groups: a rank never waits in one group while another group lacks its vote.
        for election in elections.values():
            election.count()
        for election in elections.values():
            election.finish()
        known = dict.fromkeys(world.meshes.values())
        voting = unsettled + [m for m in known if m not in unsettled and m.votes_again(digests.keys(), elections)]
        for mesh in voting:
            mesh.cast(elections)
        try:
            for mesh in known:
                if mesh not in voting:
                    mesh.check(elections)
            for election in elections.values():
                election.conclude()
            for mesh in voting:
                mesh.settle(tuple(digests.get(state, "") for state in mesh.states))
        except BaseException as error:
            for mesh in [mesh for mesh in known if not elections.keys().isdisjoint(mesh.states)]:
                mesh.break_off("the start of a graph", error)
            raise
    finally:
        for election in elections.values():
            election.close()


def launch(
    plan: Plan, group_name: str, args: tuple[Any, ...], reference: Callable[[], list[torch.Tensor]]
) -> list[torch.Tensor]:
    """Run a fused op, or its reference where the ranks have not agreed to fuse.

    Args:
        plan: the op's plan.
        group_name: name of its process group.
        args: the op's arguments without token, plan and group name.
        reference: runs the original collectives and matmuls of the op.

    Returns:
        The op's outputs without the token; fresh memory.

    Raises:
        PeerError: a peer died, aborted or did not answer in time, now or in an earlier op of these ranks.
        TscompileError: `verify` is on and the results differ, or no template runs the plan.
    """
    world = current_world()
    state = world.by_name.get((group_name, plan.executor))
    if state is None and plan.executor not in executors.NAMES:
        raise TscompileError(
            f"no executor {plan.executor!r} (site {plan.site}): the graph was compiled by another tscompile: "
            "clear the Inductor cache (TORCHINDUCTOR_CACHE_DIR)"
        )
    if state is None:
        return reference()
    start = 0.0 if state.executor.runs_ahead else time.perf_counter()
    outputs, fused = state.launch(plan, args, reference)
    if fused and world.verified and plan.site in world.verified:
        compare(plan, outputs, reference())
    if start:  # an executor that only enqueues times the op itself
        ledger.measured(plan.site, (time.perf_counter() - start) * 1e6)
    return outputs


def compare(plan: Plan, outputs: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Raise if an output is further from the reference than its dtypes explain."""
    names = (plan.dtype, *(use.dtype for use in plan.uses))
    for index, (output, reference) in enumerate(zip(outputs, expected, strict=True)):
        limit = max(_TOLERANCE.get(dtype, 0.0) for dtype in (output.dtype, *(getattr(torch, name) for name in names)))
        limit *= plan.computes
        if output.shape != reference.shape or output.dtype != reference.dtype:
            found = f"{list(output.shape)} {output.dtype} instead of {list(reference.shape)} {reference.dtype}"
        elif output.numel() == 0 or index in plan.unspecified:
            continue
        else:
            exact = reference.double()
            difference = torch.where(output == reference, 0.0, output.double() - exact)  # equal infinities are equal
            error = difference[~(output.isnan() & reference.isnan())].abs()
            scale = exact[exact.isfinite()].abs()
            worst = error.max().item() if error.numel() else 0.0
            bound = limit * (scale.max().item() if scale.numel() else 1.0)
            if worst <= bound:
                continue
            found = f"largest error {worst:.3g}, allowed {bound:.3g}"
        raise TscompileError(
            f"verify: output {index} of site {plan.site} ({plan.kind}) differs from the original ops: {found}: "
            f"report this with the output of tscompile.explain(), and run with tilescale.disable={plan.kind} meanwhile"
        )

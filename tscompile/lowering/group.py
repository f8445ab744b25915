"""What this process knows of one group of ranks: its heap, its epoch, and whether its fused ops may run.

Not for planning or arithmetic. runtime.py finds the state of a group; vote.py decides what all ranks do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..errors import HeapError, PeerError, TscompileError
from ..nvshmem.heap import DowngradedError, GroupHeap, HostChannel
from ..nvshmem.shm import process_is_alive
from ..observe import ledger, log, once
from ..problem import Plan
from ..templates import Template, find_template
from .executors import Executor, Memo
from .vote import Ballot, Post, Verdict, group_store, host_facts, judge_plans, judge_ready

_MAX_LAYOUTS = 64  # of one site: with symbolic shapes there may be one for every length that was ever seen
_SAY_AFTER_S = 20.0  # a rank that waits longer in a vote says so: compile times differ, but a user wants to know


@dataclass(frozen=True)
class Stake:
    """What a graph has at stake on a group, and the options that its ranks must share. Sizes in bytes.

    partners: ranks of the other group of each op that joins this one with another (mesh_state.py), in the graph's order.
    """

    digest: str
    sites: int
    scratch_bytes: int
    timeout_s: float | None = None
    heap_bytes: int | None = None
    verify: bool = False
    partners: tuple[tuple[int, ...], ...] = ()


class GroupState:
    """State of one group, identified by its ranks, for the life of the process group.

    Args:
        ranks: global ranks in the group's order.
        rank: this process (global).
        timeout_s: how long to wait for a peer where no option says so.
        executor: how its ops run.
    """

    def __init__(self, ranks: tuple[int, ...], rank: int, timeout_s: float, executor: Executor) -> None:
        self.ranks = ranks
        self.rank = rank
        self.names: set[str] = set()
        self.epoch = 0
        self.graphs = 0  # graphs started on this group, voted on or not
        self.refusal: Verdict | None = None  # set: the ranks run the original ops from now on
        self.error: PeerError | None = None  # set: the group is broken
        self.heap: GroupHeap | None = None  # set once a vote was won
        self.executor = executor
        self.lock = threading.RLock()
        self._agreed: set[str] = set()
        self._default_timeout_s = timeout_s
        self._timeout_s = timeout_s
        self._limit_bytes: int | None = None
        self._store: dist.Store | None = None
        self._votes = 0
        self._memos: dict[str, dict[tuple[Any, ...], Memo]] = {}  # by site and layout
        self._growths = 0
        self._refused_ballots: list[Ballot] = []

    def _ballot(self, key: str) -> Ballot:
        if self._store is None:
            self._store = group_store(self.ranks, self.rank, self.executor.name)
        return Ballot(self._store, self.ranks, self.rank, key)

    def start_again(self) -> None:
        """A graph starts that needs no vote any more. A peer that holds a vote instead learns that it is alone with it."""
        self.graphs += 1
        if self.heap is not None:
            self.heap.start(self.graphs)

    def open_vote(self, stake: Stake, *, again: bool = False) -> Election | None:
        """Cast this rank's vote on a graph, without waiting; None if there is nothing to wait for. again: also on agreed digests."""
        if stake.digest in self._agreed and self.refusal is None and not again:
            self.start_again()
            return None
        self.graphs += 1
        self._votes += 1
        ballot = self._ballot(f"vote{self._votes}")
        code, refusal = "", ""
        if self.refusal is not None:
            code, refusal = self.refusal.code, self.refusal.reason
        elif self.error is not None:
            code, refusal = "peer-error", str(self.error)
        elif stake.sites == 0:
            code = "no-sites"
            refusal = f"rank {self.rank} has no fused sites on this group: compile the same model on every rank"
        if refusal:
            ballot.post(0, {"code": code, "refusal": refusal})
            self._refused_ballots.append(ballot)
            self._keep_rows()
            return None
        return Election(self, ballot, stake)

    def adopt(self, stake: Stake, heap: GroupHeap) -> None:
        """A vote was won: the graph may run fused."""
        self.heap = heap
        self._agreed.add(stake.digest)
        self._timeout_s = stake.timeout_s if stake.timeout_s is not None else self._default_timeout_s
        self._limit_bytes = stake.heap_bytes
        self.executor.adopt(heap, self.ranks, self._timeout_s)
        ledger.holds(self.executor.describe(heap, self.ranks))

    def refuse(self, verdict: Verdict) -> None:
        """From the next epoch on the ranks run the original ops; peers that are waiting in it are told."""
        if self.refusal is not None:
            return
        if self.heap is not None:
            ahead = [i for i in range(len(self.ranks)) if self.heap.entered(i) > self.epoch]
            if ahead and self.executor.runs_ahead:
                # What a peer has enqueued waits for this rank on the GPU and cannot be taken back.
                channel = self._channel("the start of a graph")
                self.error = channel.fail(self.heap.rank, verdict.reason)
                self.executor.raised = True
                self.executor.stop()
                raise self.error
            self.heap.downgrade(self.epoch + 1, f"{verdict.code}|{verdict.reason}")
        self.refusal = verdict
        self._tell()

    def _channel(self, site: str) -> HostChannel:
        assert self.heap is not None
        return self.executor.channel(self.heap, self.ranks, self.epoch, site, self._timeout_s)

    def _tell(self) -> None:
        assert self.refusal is not None
        log.warning("ranks %s run the original ops: %s", list(self.ranks), self.refusal.reason)
        self._keep_rows()

    def _keep_rows(self) -> None:
        if self.refusal is not None:
            for name in self.names:
                ledger.keep_group(name, self.refusal.code, self.refusal.reason)

    def vote_is_lost(self) -> Verdict | None:
        """A reason to stop waiting in a vote, other than time."""
        for ballot in self._refused_ballots:
            verdict = ballot.verdict(0)
            if verdict is not None:
                return verdict
        if self.heap is None:
            return None
        downgrade = self.heap.downgraded()
        if downgrade is not None:
            return _decode(downgrade[1])
        for index, peer in enumerate(self.ranks):
            if peer == self.rank:
                continue
            if self.heap.entered(index) > self.epoch or self.heap.started(index) >= self.graphs:
                return Verdict(
                    False,
                    "lone-compile",
                    f"rank {self.rank} started a new graph while rank {peer} ran one that was agreed on before: "
                    "let all ranks recompile together, or mark what changed as dynamic",
                )
        return None

    def wait_s(self, stake: Stake) -> float:
        return stake.timeout_s if stake.timeout_s is not None else self._default_timeout_s

    def launch(
        self, plan: Plan, args: tuple[Any, ...], reference: Callable[[], list[torch.Tensor]]
    ) -> tuple[list[torch.Tensor], bool]:
        """Run one op; returns its outputs and whether the template made them.

        Raises:
            PeerError: a peer died, aborted or did not answer, now or earlier.
        """
        if self.refusal is not None or self.heap is None:
            return reference(), False
        template = find_template(plan.kind, plan.executor)
        if template is None:
            raise TscompileError(
                f"no template for {plan.kind} on {plan.executor!r} (site {plan.site}): the graph was compiled by another "
                "tscompile: clear the Inductor cache (TORCHINDUCTOR_CACHE_DIR)"
            )
        with self.lock:
            self.raise_error()
            try:
                self._next_epoch(plan.site)
                outputs = self._run(template, plan, args)
                if outputs is not None:
                    return outputs, True
            except DowngradedError as stop:
                self.step_back(stop)
            except PeerError as error:
                self.error = error
                self.executor.raised = True
                raise
            except BaseException as error:
                self.break_off(plan.site, error)
                raise
        return reference(), False

    def _next_epoch(self, site: str) -> None:
        """Raises DowngradedError or PeerError if the group will not finish it."""
        assert self.heap is not None
        self.epoch += 1
        if self.executor.enter(self.heap, self.epoch, site):
            self._check(site)

    def raise_error(self) -> None:
        """Raise what broke the group, if something did."""
        if self.error is not None:
            raise PeerError(self.error.rank, self.error.site, str(self.error))

    def enter(self, site: str, need: int) -> HostChannel | None:
        """Enter the next epoch for an op that runs in several groups, as `launch` does for those of one; `lock` is held.

        Args:
            need: bytes of a half that it takes.

        Returns:
            The epoch's channel; None if the ranks of this group run the original ops, as all of them know.

        Raises:
            DowngradedError: the ranks run the original ops from this epoch on; `step_back` is to be told.
            PeerError: the group is broken.
        """
        if self.refusal is not None or self.heap is None:
            return None
        self.raise_error()
        self._next_epoch(site)
        if need > self.heap.half_bytes and not self._has_room(need, site):
            return None
        return self._channel(site)

    def commit(self, site: str) -> None:
        """Enter the next epoch for an op of several groups that cannot be taken back; `lock` is held.

        Raises:
            DowngradedError: the ranks of this group run the original ops, now or for longer.
            PeerError: the group is broken.
        """
        self.raise_error()
        if self.refusal is not None:
            raise DowngradedError(f"{self.refusal.code}|{self.refusal.reason}")
        self._next_epoch(site)

    def step_back(self, stop: DowngradedError) -> None:
        """The ranks run the original ops from now on, because a rank takes no part in an epoch."""
        if self.refusal is None:
            self.refusal = _decode(stop.reason)
            self._tell()

    def break_off(self, site: str, error: BaseException) -> None:
        """This rank leaves an op unfinished: end the waits of its peers. If one of them has said why already, that stands."""
        assert self.heap is not None
        text = f"rank {self.rank} raised {type(error).__name__}: {str(error)[:300]}"
        self.error = self._channel(site).fail(self.heap.rank, text)
        self.executor.raised = True
        self.executor.stop()

    def _check(self, site: str) -> None:
        """Raise DowngradedError or PeerError if the group will not finish this epoch."""
        channel = self._channel(site)
        failure = self.executor.failed()
        if failure is not None:
            raise channel.fail(*failure)
        channel.check()

    def _run(self, template: Template, plan: Plan, args: tuple[Any, ...]) -> list[torch.Tensor] | None:
        """Outputs of the template; None if the original ops must run: on every rank, since all see the same sizes."""
        assert self.heap is not None
        memo = self.memo(template, plan, args)
        if not 0 <= memo.need <= self.heap.half_bytes and not self._has_room(memo.need, plan.site):
            return None
        channel = None if self.executor.runs_ahead else self._channel(plan.site)
        if torch.is_grad_enabled():  # compiled code runs without, as a rule
            with torch.no_grad():
                return self.executor.run(template, channel, plan, args, memo)
        return self.executor.run(template, channel, plan, args, memo)

    def memo(self, template: Template, plan: Plan, args: tuple[Any, ...]) -> Memo:
        """What launches of this site with this layout share; it is looked up at every launch."""
        key = _layout(args)
        memos = self._memos.get(plan.site)
        memo = None if memos is None else memos.get(key)
        if memo is not None:
            return memo
        memos = self._memos.setdefault(plan.site, {})
        if len(memos) >= _MAX_LAYOUTS and self.executor.settle():
            for old in list(memos)[: _MAX_LAYOUTS // 2]:
                del memos[old]
        memo = memos[key] = Memo(template.scratch_bytes(plan, len(self.ranks), *args))
        if memo.need < 0:
            ledger.keep_site(plan.site, "unsupported", "no kernel serves the sizes of this call: the original ops run")
        return memo

    def _has_room(self, need: int, site: str) -> bool:
        """Grow the arenas for a call that needs so many bytes; False if no kernel serves it (it is negative), or it is too much."""
        assert self.heap is not None
        if need < 0:
            return False
        half = max(need, self.heap.half_bytes * 3 // 2)
        if self._limit_bytes is not None:
            limit = self._limit_bytes // self.executor.shares
            half = max(need, min(half, limit))
            if need > limit:
                reason = "a call needs more than tilescale.heap_bytes allows: the original ops run"
                ledger.keep_site(site, "no-room", reason)
                return False
        self._grow(half, self._channel(site))
        return True

    def _grow(self, half_bytes: int, channel: HostChannel) -> None:
        """Replace the arenas of all ranks by larger ones, in the middle of an op; every rank does so in the same epoch."""
        heap = self.heap
        assert heap is not None
        self._growths += 1
        ballot = self._ballot(f"growth{self._growths}")
        deadline = time.monotonic() + self._timeout_s

        def interrupt(missing: list[int]) -> None:
            channel.check()
            for rank in missing:
                index = self.ranks.index(rank)
                if not heap.alive(index):
                    raise channel.fail(
                        index, f"the process of rank {rank} has ended: look at its log for the first error"
                    )
                if time.monotonic() > deadline:
                    raise channel.fail(index, f"rank {rank} did not grow the heap within {self._timeout_s:g} s")

        try:
            ballot.post(0, _attempt(self.rank, lambda: heap.prepare(half_bytes)))
            verdict, posts = ballot.settle(0, judge_ready("no-room", self.ranks), interrupt)
            if verdict.agreed:
                ballot.post(1, _attempt(self.rank, lambda: heap.connect([dict(posts[rank]) for rank in self.ranks])))
                verdict, _ = ballot.settle(1, judge_ready("no-mapping", self.ranks), interrupt)
        finally:
            heap.release_names()
        if not verdict.agreed:
            raise DowngradedError(f"{verdict.code}|{verdict.reason}")
        self.executor.adopt(heap, self.ranks, self._timeout_s)
        ledger.holds(self.executor.describe(heap, self.ranks))


class Election:
    """A vote of one graph on one group, in steps, so that a rank with several groups posts to all before it waits for any.

    Attributes:
        verdict: as far as it has come. posts: what the ranks have posted, by global rank, once they are counted.
        partners: of the stake.
    """

    def __init__(self, state: GroupState, ballot: Ballot, stake: Stake) -> None:
        self._state = state
        self._ballot = ballot
        self._stake = stake
        self.partners = stake.partners
        self.posts: dict[int, Post] = {}
        self._heap = state.heap
        post: dict[str, Any] = {
            "digest": stake.digest,
            "sites": stake.sites,
            "verify": stake.verify,
            "heap_bytes": stake.heap_bytes,
            "facts": host_facts(),
            "partners": stake.partners,
        }
        half = stake.scratch_bytes
        if stake.heap_bytes is not None:
            half = min(half, stake.heap_bytes // state.executor.shares)
        try:
            if self._heap is None:
                self._heap = state.executor.make_heap(state.ranks, state.ranks.index(state.rank), stake.heap_bytes)
            if not self._heap.connected or half > self._heap.half_bytes:
                post |= self._heap.prepare(half)
        except HeapError as error:
            post |= {"code": "no-heap", "refusal": f"rank {state.rank}: {error}"}
        ballot.post(0, post)
        self._opened = time.monotonic()
        self._deadline = self._opened + state.wait_s(stake)
        self.verdict = Verdict(False)

    def count(self) -> None:
        """Wait for the votes; if all agree, map the peers' memory and say so, without waiting."""
        judge = judge_plans(self._state.ranks)
        self.verdict, self.posts = self._ballot.settle(0, judge, self.interrupt)
        if self.verdict.agreed:
            self._ballot.post(1, _attempt(self._state.rank, self._connect))

    def finish(self) -> None:
        """Wait until all ranks have mapped the memory."""
        if self.verdict.agreed:
            judge = judge_ready("no-mapping", self._state.ranks)
            self.verdict, _ = self._ballot.settle(1, judge, self.interrupt)
        self.close()

    def conclude(self) -> None:
        """The graph may run fused, or the group runs the original ops. Raises PeerError if it is too late for that."""
        if self.verdict.agreed and self._heap is not None:
            self._state.adopt(self._stake, self._heap)
        else:
            self._state.refuse(self.verdict)

    def close(self) -> None:
        """Leave no name in /dev/shm behind."""
        if self._heap is not None:
            self._heap.release_names()

    def _connect(self) -> None:
        # Sizes are hints where shapes are symbolic, so the ranks may differ in what they think they need. Then nothing
        # grows now; the op that needs more grows the arenas.
        self._state.executor.ready()
        posts = [dict(self.posts[rank]) for rank in self._state.ranks]
        if self._heap is not None and all("arena" in post for post in posts):
            self._heap.connect(posts)

    def interrupt(self, missing: list[int]) -> Verdict | None:
        """A reason to wait no longer for these ranks' posts."""
        lost = self._state.vote_is_lost()
        if time.monotonic() - self._opened > _SAY_AFTER_S:
            once(
                f"vote:{self._state.ranks}:{self._ballot.key}",
                "waiting for ranks %s to compile and vote on their fused sites (for %.0f s at most)",
                missing,
                self._state.wait_s(self._stake),
            )
        if lost is None and time.monotonic() > self._deadline:
            waited = self._state.wait_s(self._stake)
            reason = (
                f"rank {missing[0]} did not vote within {waited:g} s: look for a rank that runs another program path"
            )
            return Verdict(False, "vote-timeout", reason)
        if lost is None:
            for rank in missing:
                post = self.posts.get(rank, {})
                if "pid" in post and not process_is_alive(post["pid"], post["start"]):
                    return Verdict(
                        False, "peer-ended", f"rank {rank} ended during the vote: look at its log for the first error"
                    )
        return lost


def _attempt(rank: int, action: Callable[[], dict[str, object] | None]) -> dict[str, object]:
    """Do this rank's part of a stage; returns what to post about it."""
    try:
        return action() or {}
    except HeapError as error:
        return {"refusal": f"rank {rank}: {error}"}


def _layout(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Shapes and strides of an op's arguments: tensors, lists of tensors, or sizes."""
    layout: list[Any] = []
    for value in args:
        if value.__class__ is list:  # as a rule
            if value and value[0].__class__ is int:
                layout += value  # sizes, which may be many
            else:
                for item in value:
                    if isinstance(item, torch.Tensor):
                        layout += item.shape, item.stride()
                    else:  # None
                        layout.append(item)
            layout.append(len(value))
        elif isinstance(value, torch.Tensor):
            layout += value.shape, value.stride()
        elif isinstance(value, tuple):
            layout += _layout(value), len(value)
        else:
            layout.append(value)
    return tuple(layout)


def _decode(text: str) -> Verdict:
    code, _, reason = text.partition("|")
    return Verdict(False, code, reason)

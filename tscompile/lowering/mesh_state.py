"""What this process knows of one mesh of ranks: its row and its column of it, and whether all ranks run the ops that join them.

For executors whose ops cannot be taken back once they are enqueued: a rank that ran such an op fused beside one that did not would wait
for ever, so all ranks of the mesh decide together, before the first op. Where ops can be taken back, each group decides for
itself (mesh.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import PeerError, TscompileError
from ..nvshmem.heap import DowngradedError
from ..observe import ledger, log
from ..problem import Plan
from ..templates import find_template
from .group import Election, GroupState
from .vote import Ballot, BallotBox, Post, Verdict, judge_ready

# Verdicts of ranks that the others have not met in a vote: those may run ops of an earlier graph of the mesh by now.
_OUT_OF_STEP = ("lone-compile", "peer-ended", "vote-timeout")


class MeshState:
    """State of a mesh for the life of the process group.

    Args:
        states: the two groups of this rank.
        boxes: for the ballots of all meshes, by the ranks that hold them.

    Attributes:
        refusal: set: all ranks of the mesh run the original ops of what joins its groups, from now on.
        ranks: global ranks of the whole mesh, sorted; empty until the first vote has told them.
    """

    def __init__(self, states: tuple[GroupState, GroupState], boxes: dict[tuple[int, ...], BallotBox]) -> None:
        self.states = states
        self._boxes = boxes
        self.refusal: Verdict | None = None
        self.ranks: tuple[int, ...] = ()
        self._agreed: set[tuple[str, ...]] = set()
        self._sites: set[str] = set()
        self._ballot: Ballot | None = None
        self._elections: list[Election] = []

    def add(self, sites: Sequence[str]) -> None:
        """Sites of a graph that join its groups."""
        self._sites.update(sites)
        if self.refusal is not None:
            self._refuse(self.refusal)

    def _refuse(self, verdict: Verdict) -> None:
        if self.refusal is None:
            log.warning(
                "ranks %s run the original ops of what joins them: %s",
                list(self.ranks) or "across two refused groups",
                verdict.reason,
            )
        self.refusal = verdict
        for site in self._sites:
            ledger.keep_site(site, verdict.code, verdict.reason)

    def agreed_on(self, digests: tuple[str, ...]) -> bool:
        """Whether graphs with these digests of the two groups need no vote any more."""
        return self.refusal is not None or digests in self._agreed

    def votes_again(self, used: Collection[GroupState], elections: Mapping[GroupState, Election]) -> bool:
        """Whether the mesh votes on a graph that uses these groups and has no op of both that is to be agreed on.

        A group that is refused on that graph could not run the mesh's ops of earlier graphs. So all ranks of the mesh should hear of
        it, if they are there: a graph that uses the row and the column is one of the whole mesh, but a row may run one of its own.
        """
        whole = all(state in used for state in self.states)
        return self.refusal is None and whole and not elections.keys().isdisjoint(self.states)

    def check(self, elections: Mapping[GroupState, Election]) -> None:
        """Of a graph on which the mesh does not vote. Raises PeerError (and break_off is to be called) if a group is refused: ranks
        across the mesh do not hear of it, and will enqueue ops of both groups."""
        if self.refusal is not None or not self._agreed:
            return
        for state in self.states:
            election = elections.get(state)
            if election is not None and not election.verdict.agreed:
                raise PeerError(state.rank, "the start of a graph", election.verdict.reason)

    def cast(self, elections: Mapping[GroupState, Election]) -> None:
        """Tell the mesh how the votes of this rank's groups came out, without waiting. `elections`: of this graph, finished."""
        self._elections = [elections[state] for state in self.states if state in elections]
        self._ballot = None
        refused = next((election.verdict for election in self._elections if not election.verdict.agreed), None)
        refused = next((state.refusal for state in self.states if state.refusal is not None), refused)
        if not self.ranks:
            self.ranks = self._find_ranks(elections)
        if not self.ranks:
            # Both groups are refused. Across the mesh they hear of it from the ranks that share one of them, and have another.
            assert refused is not None
            self._refuse(refused)
            return
        if self.ranks not in self._boxes:
            left = self.states[0]
            self._boxes[self.ranks] = BallotBox(self.ranks, left.rank, f"mesh of {left.executor.name}")
        self._ballot = self._boxes[self.ranks].next()
        self._ballot.post(0, {} if refused is None else {"code": refused.code, "refusal": refused.reason})

    def _find_ranks(self, elections: Mapping[GroupState, Election]) -> tuple[int, ...]:
        """The union of the columns that meet this rank's row, or of the rows that meet its column: either one is the whole mesh. A rank
        that finds another set of ranks than its peers do votes with others than they, and so they do not agree."""
        found: set[int] = set()
        for state, other in (self.states, self.states[::-1]):
            election = elections.get(state)
            if election is None or not election.verdict.agreed or other.ranks not in election.partners:
                continue
            found |= _union(election.posts, election.partners.index(other.ranks))
        return tuple(sorted(found))

    def settle(self, digests: tuple[str, ...]) -> None:
        """Wait for the mesh's verdict.

        Raises (and break_off is to be called):
            PeerError: the mesh had agreed before, and a rank did not vote: what it may have enqueued cannot be taken back.
        """
        ballot, self._ballot = self._ballot, None
        if ballot is None:
            return
        verdict, _ = ballot.settle(0, judge_ready("", self.ranks), self._interrupt)
        self._elections = []
        if verdict.agreed:
            self._agreed.add(digests)
            left, right = (state.executor for state in self.states)
            left.join(right)
            return
        if self._agreed and verdict.code in _OUT_OF_STEP:
            raise PeerError(self.states[0].rank, "the start of a graph", verdict.reason)
        self._refuse(verdict)

    def _interrupt(self, missing: list[int]) -> Verdict | None:
        verdicts = (election.interrupt(missing) for election in self._elections)
        return next((verdict for verdict in verdicts if verdict is not None), None)

    def launch(
        self,
        plan: Plan,
        left: GroupState,
        right: GroupState,
        args: tuple[Any, ...],
        reference: Callable[..., list[Tensor]],
    ) -> tuple[list[Tensor], bool]:
        """Run one op of both groups; returns its outputs and whether the template made them.

        Args:
            left, right: the group of the left operand, and of the right one.

        Raises:
            PeerError: a peer died, aborted or did not answer in either group, now or earlier, or takes no part.
        """
        if self.refusal is not None:
            return reference(), False
        template = find_template(plan.kind, plan.executor)
        if template is None:
            raise TscompileError(
                f"no template for {plan.kind} on {plan.executor!r} (site {plan.site}): the graph was compiled by another "
                "tscompile: clear the Inductor cache (TORCHINDUCTOR_CACHE_DIR)"
            )
        with self.states[0].lock, self.states[1].lock:  # always in this order
            try:
                left.commit(plan.site)
                right.commit(plan.site)
                memo = left.memo(template, plan, args)
                if (
                    memo.need < 0
                ):  # the ranks have agreed on the sizes that the graph was compiled for, and the template took those
                    raise TscompileError(
                        f"site {plan.site} got tensors of other sizes than its graph was compiled for: report this, and run with "
                        f"tilescale.disable={plan.kind} meanwhile"
                    )
                return left.executor.run_joined(right.executor, template, plan, args, memo), True
            except DowngradedError as stop:
                # The ranks across the mesh have not heard of it, and may have enqueued their part.
                error = PeerError(left.rank, plan.site, stop.reason.partition("|")[2])
                self.break_off(plan.site, error)
                raise error from stop
            except BaseException as error:
                self.break_off(plan.site, error)
                raise

    def break_off(self, site: str, error: BaseException) -> None:
        """The peers in either group wait for a rank that has left."""
        for state in self.states:
            if state.heap is not None and state.refusal is None:
                state.break_off(site, error)


def _union(posts: Mapping[int, Post], place: int) -> set[int]:
    partners: Sequence[Sequence[Sequence[int]]] = [post["partners"] for post in posts.values()]
    return {rank for each in partners if place < len(each) for rank in each[place]}

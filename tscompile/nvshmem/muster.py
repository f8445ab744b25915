"""Agreement of all ranks of the world on one thing that they do together or not at all, bounded in time.

Not for groups: lowering/vote.py holds the votes of a group. A muster has numbered stages. In each a rank posts a statement,
then waits until the stage is ruled on. Whoever has seen enough rules, by a compare-and-set, and everybody adopts the ruling
that stands: a rank that gave up waiting and a rank that comes late agree.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

Statement = Mapping[str, Any]
Judge = Callable[[Mapping[int, Statement]], "Ruling | None"]
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.02


class Store(Protocol):
    """What a muster needs of a torch.distributed.Store."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def check(self, keys: list[str], /) -> bool: ...

    def compare_set(self, key: str, expected_value: str, desired_value: str, /) -> bytes: ...


@dataclass(frozen=True)
class Ruling:
    """What all ranks do; `reason` says why not, and is empty if they go."""

    go: bool
    reason: str = ""


class Muster:
    """One muster of the ranks 0 to `size` - 1.

    Args:
        store: shared by all ranks of the world, and used for nothing else.
        rank: this rank.
        size: number of ranks.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store = store
        self.rank = rank
        self.size = size

    def post(self, stage: int, statement: Statement) -> None:
        """State this rank's position. Does not wait."""
        self._store.set(f"{stage}/{self.rank}", json.dumps(statement))

    def ruling(self, stage: int) -> Ruling | None:
        """The ruling of a stage if there is one."""
        key = f"{stage}/ruling"
        return Ruling(**json.loads(self._store.get(key))) if self._store.check([key]) else None

    def rule(self, stage: int, ruling: Ruling) -> Ruling:
        """Propose a ruling; returns the one that stands."""
        return Ruling(**json.loads(self._store.compare_set(f"{stage}/ruling", "", json.dumps(asdict(ruling)))))

    def settle(self, stage: int, judge: Judge, bound_s: float) -> tuple[Ruling, dict[int, Statement]]:
        """Wait for the ruling, for `bound_s` seconds at most; returns it and the statements seen, by rank.

        Args:
            judge: ruling on the statements so far, None to wait for more; it must rule once all ranks have posted.
            bound_s: after that many seconds this rank proposes to decline.
        """
        posts: dict[int, Statement] = {}
        deadline = time.monotonic() + bound_s
        pause = _FIRST_PAUSE_S
        while True:
            for rank in range(self.size):
                if rank not in posts and self._store.check([f"{stage}/{rank}"]):
                    posts[rank] = json.loads(self._store.get(f"{stage}/{rank}"))
            standing = self.ruling(stage)
            if standing is None:
                proposal = judge(posts)
                if proposal is None and time.monotonic() >= deadline:
                    missing = next(rank for rank in range(self.size) if rank not in posts)
                    proposal = Ruling(False, f"rank {missing} did not answer within {bound_s:g} s")
                if proposal is not None:
                    standing = self.rule(stage, proposal)
            if standing is not None and (not standing.go or len(posts) == self.size):
                return standing, posts
            time.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE_S)


def judge_ready(size: int) -> Judge:
    """Judge of a stage in which a rank that cannot go on posts `refusal`, a reason without the rank's name."""

    def judge(posts: Mapping[int, Statement]) -> Ruling | None:
        for rank, post in sorted(posts.items()):
            if post.get("refusal"):
                return Ruling(False, f"rank {rank}: {post['refusal']}")
        return Ruling(True) if len(posts) == size else None

    return judge


def judge_alike(size: int, facts: Mapping[str, str]) -> Judge:
    """As `judge_ready`, and the statements must be equal in `facts` (fact -> what it means when two ranks differ)."""
    ready = judge_ready(size)

    def judge(posts: Mapping[int, Statement]) -> Ruling | None:
        first = min(posts, default=0)
        ruling = ready(posts)
        if ruling is not None and not ruling.go:
            return ruling
        for rank, post in sorted(posts.items()):
            for fact, meaning in facts.items():
                if post.get(fact) != posts[first].get(fact):
                    return Ruling(False, f"ranks {first} and {rank} {meaning}")
        return ruling

    return judge


class Worker(threading.Thread):
    """Runs `action` in a daemon thread, for calls into libraries that may wait for a dead peer for ever.

    Attributes:
        error: what `action` raised, None if it returned or still runs.
    """

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        super().__init__(name=name, daemon=True)
        self._action = action
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._action()
        except Exception as error:
            self.error = error

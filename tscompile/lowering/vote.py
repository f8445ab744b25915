"""Agreement between the ranks of a group through its store: bounded, decided once, the same for everyone.

Not for the data path: a ballot costs a few round trips of the store and is held once per graph and group, or when the arena grows.

A ballot has stages. In each stage a rank posts a statement, then waits until the stage is decided. Whoever has seen enough
decides, by a compare-and-set of the verdict, and everybody adopts the verdict that stands, whatever they would have
decided themselves. So a rank that gives up waiting and a rank that comes late agree.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from .. import problem
from ..nvshmem import shm

Post = Mapping[str, Any]
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.0002, 0.01


@dataclass(frozen=True)
class Verdict:
    """What the ranks decided. `code` is stable, `reason` names the rank and what to do; both are empty if agreed."""

    agreed: bool
    code: str = ""
    reason: str = ""


AGREED = Verdict(True)


def group_store(ranks: tuple[int, ...], rank: int, executor: str) -> dist.Store:
    """The part of the default store that the ranks of one group share for votes.

    Keys of an earlier life of the group in the same store are not seen: each start of a rank is counted, and since a start
    goes with the initialisation of the process group, the ranks count alike.
    """
    name = blake2b(f"{executor}{ranks}".encode(), digest_size=12).hexdigest()
    store = dist.PrefixStore(f"tscompile/{name}", distributed_c10d._get_default_store())
    start = store.add(f"starts/{rank}", 1)
    return dist.PrefixStore(str(start), store)


class Ballot:
    """One numbered vote of a group.

    Args:
        store: from `group_store`.
        ranks: global ranks of the group.
        rank: this rank (global).
        key: name of the ballot, the same on every rank.
    """

    def __init__(self, store: dist.Store, ranks: tuple[int, ...], rank: int, key: str) -> None:
        self._store = store
        self.ranks = ranks
        self.rank = rank
        self.key = key

    def post(self, stage: int, statement: Post) -> None:
        """State this rank's position. Does not wait."""
        self._store.set(f"{self.key}/{stage}/{self.rank}", json.dumps(statement))

    def verdict(self, stage: int) -> Verdict | None:
        """The verdict of a stage if it is decided."""
        key = f"{self.key}/{stage}/verdict"
        if not self._store.check([key]):
            return None
        return Verdict(**json.loads(self._store.get(key)))

    def decide(self, stage: int, verdict: Verdict) -> Verdict:
        """Propose a verdict; returns the one that stands."""
        standing = self._store.compare_set(f"{self.key}/{stage}/verdict", "", json.dumps(asdict(verdict)))
        return Verdict(**json.loads(standing))

    def settle(
        self,
        stage: int,
        judge: Callable[[dict[int, Post]], Verdict | None],
        interrupt: Callable[[list[int]], Verdict | None],
    ) -> tuple[Verdict, dict[int, Post]]:
        """Wait until the stage is decided; returns the verdict and the posts seen, by global rank.

        Args:
            judge: verdict on the posts so far, None to wait for more; it must decide once all ranks have posted.
            interrupt: called while waiting, with the ranks that have not posted; a verdict ends the wait, and it may raise.
        """
        posts: dict[int, Post] = {}
        pause = _FIRST_PAUSE_S
        while True:
            for rank in self.ranks:
                if rank not in posts and self._store.check([f"{self.key}/{stage}/{rank}"]):
                    posts[rank] = json.loads(self._store.get(f"{self.key}/{stage}/{rank}"))
            proposal = judge(posts)
            standing = self.verdict(stage)
            if standing is None and proposal is None:
                proposal = interrupt([rank for rank in self.ranks if rank not in posts])
            if standing is None and proposal is not None:
                standing = self.decide(stage, proposal)
            if standing is not None and (not standing.agreed or len(posts) == len(self.ranks)):
                return standing, posts
            time.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE_S)


class BallotBox:
    """The ballots of one set of ranks, numbered alike on all of them; arguments as group_store."""

    def __init__(self, ranks: tuple[int, ...], rank: int, name: str) -> None:
        self._store = group_store(ranks, rank, name)
        self._ranks, self._rank, self._count = ranks, rank, 0

    def next(self) -> Ballot:
        self._count += 1
        return Ballot(self._store, self._ranks, self._rank, f"ballot{self._count}")


@lru_cache(maxsize=1)
def host_facts() -> dict[str, str]:
    """What must be equal for ranks to share memory: host, boot, namespaces, the /dev/shm mount, user, versions."""
    facts = {"host": socket.gethostname(), "user": str(os.getuid())}
    try:
        facts["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        facts["boot"] = "unknown"
    for namespace in ("pid", "ipc"):
        try:
            facts[f"{namespace} namespace"] = os.readlink(f"/proc/self/ns/{namespace}")
        except OSError:
            facts[f"{namespace} namespace"] = "unknown"
    try:
        facts["/dev/shm"] = str(os.stat(shm.SHM_DIR).st_dev)
    except OSError:
        facts["/dev/shm"] = "missing"
    facts["torch"] = torch.__version__
    facts["plan version"] = str(problem.PLAN_VERSION)
    return facts


def judge_plans(ranks: tuple[int, ...]) -> Callable[[dict[int, Post]], Verdict | None]:
    """Judge of the first stage of a vote on a graph: every rank is willing, shares memory and has planned the same sites.

    A rank that is not willing posts `code` and `refusal`, a sentence that names the rank.
    """

    def judge(posts: dict[int, Post]) -> Verdict | None:
        for _, post in sorted(posts.items()):
            if post.get("refusal"):
                return Verdict(False, str(post["code"]), str(post["refusal"]))
        if not posts:
            return None
        first = min(posts)
        for rank, post in sorted(posts.items()):
            difference = _difference(first, posts[first], rank, post)
            if difference is not None:
                return difference
        return AGREED if len(posts) == len(ranks) else None

    return judge


def _difference(first: int, expected: Post, rank: int, post: Post) -> Verdict | None:
    for fact, value in expected["facts"].items():
        other = post["facts"].get(fact)
        if other == value:
            continue
        if fact in ("host", "boot"):
            reason = f"rank {rank} is on another host than rank {first}: shared memory reaches one host"
            return Verdict(False, "other-host", reason)
        return Verdict(
            False,
            "other-environment",
            f"rank {rank} differs from rank {first} in {fact} ({other} and {value}): start the ranks in one environment",
        )
    if post["digest"] != expected["digest"]:
        return Verdict(
            False,
            "other-sites",
            f"rank {rank} planned other sites: {post['sites']} (digest {post['digest'][:12]}) where rank {first} planned "
            f"{expected['sites']} (digest {expected['digest'][:12]}): compile the same model with the same options on every rank",
        )
    for fact in ("verify", "heap_bytes"):
        if post[fact] != expected[fact]:
            return Verdict(
                False,
                "other-options",
                f"rank {rank} has {fact} = {post[fact]} where rank {first} has {expected[fact]}: "
                "set the same tilescale options on every rank",
            )
    return None


def judge_ready(code: str, ranks: tuple[int, ...]) -> Callable[[dict[int, Post]], Verdict | None]:
    """Judge of a stage in which each rank only says whether it managed its part. A refusal may bring a code of its own."""

    def judge(posts: dict[int, Post]) -> Verdict | None:
        for _, post in sorted(posts.items()):
            if post.get("refusal"):
                return Verdict(False, str(post.get("code", code)), str(post["refusal"]))
        return AGREED if len(posts) == len(ranks) else None

    return judge

"""NVSHMEM's numbers, by the names that TileScale gives them. A test compares them with the installed headers."""

from __future__ import annotations

from enum import IntEnum


class Amo(IntEnum):
    """Atomic operations (`nvshmemi_amo_t`). `SIGNAL_SET` and `SIGNAL_ADD` are those that signals take."""

    ACK = 1
    INC = 2
    SET = 3
    ADD = 4
    AND = 5
    OR = 6
    XOR = 7
    SIGNAL = 8
    SIGNAL_SET = 9
    SIGNAL_ADD = 10
    END_OF_NONFETCH = 11
    FETCH = 12
    FETCH_INC = 13
    FETCH_ADD = 14
    FETCH_AND = 15
    FETCH_OR = 16
    FETCH_XOR = 17
    SWAP = 18
    COMPARE_SWAP = 19


class CmpType(IntEnum):
    """Comparisons of a wait (`NVSHMEM_CMP_*`)."""

    EQ = 0
    NE = 1
    GT = 2
    LE = 3
    LT = 4
    GE = 5


class Team(IntEnum):
    """Teams that NVSHMEM defines (`NVSHMEM_TEAM_*`). For the ranks of a group, which are on one host, WORLD, SHARED, NODE and
    GPU_LEADERS are the group, and SAME_MYPE_NODE and SAME_GPU the rank alone."""

    INVALID = -1
    WORLD = 0
    SHARED = 1
    NODE = 2
    SAME_MYPE_NODE = 3
    SAME_GPU = 4
    GPU_LEADERS = 5

"""Which versions this release works with, and what is known to be wrong in them. Data only; imports nothing heavy."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

TORCH_MIN = (2, 11)
TORCH_BELOW = (2, 16)
TILELANG = "0.1.15"
NVSHMEM_WHEELS = ("nvidia-nvshmem-cu12", "nvidia-nvshmem-cu13")


@dataclass(frozen=True)
class KnownProblem:
    """A defect of torch itself in versions `since <= v < before`; it shows with every backend."""

    since: tuple[int, int]
    before: tuple[int, int]
    what: str
    detail: str
    action: str


KNOWN_PROBLEMS = (
    KnownProblem(
        (2, 11),
        (2, 12),
        "autograd.Function",
        "torch 2.11 compiles an autograd.Function that calls in-place collectives (Megatron style) to wrong gradients, "
        "without an error and with every backend",
        "use torch 2.12 or later, or DTensor or functional collectives",
    ),
    KnownProblem(
        (2, 11),
        (2, 12),
        "all_gather_tensor",
        "torch 2.11 breaks the graph at all_gather_tensor with gather_dim != 0",
        "use torch 2.13 or later, or gather along dim 0",
    ),
    KnownProblem(
        (2, 12),
        (2, 14),
        "checkpointing + DTensor",
        "torch 2.12 and 2.13 fail with an assertion on tensors_saved_with_vc_check when activation checkpointing meets "
        "DTensor tensor parallelism in a compiled region",
        "use torch 2.14 or later, or compile without activation checkpointing",
    ),
)


def installed(package: str) -> str | None:
    """Version of an installed distribution, from its metadata: nothing is imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def major_minor(text: str) -> tuple[int, int]:
    """(2, 13) for "2.13.0+cpu"."""
    match = re.match(r"(\d+)\.(\d+)", text)
    if match is None:
        raise ValueError(f"cannot read the version {text!r}")
    return int(match[1]), int(match[2])


def known_problems(torch_version: str) -> list[KnownProblem]:
    """What is known to be wrong in this torch."""
    found = major_minor(torch_version)
    return [problem for problem in KNOWN_PROBLEMS if problem.since <= found < problem.before]

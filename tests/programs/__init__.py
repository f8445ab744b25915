"""Parallel programs as people write them, re-created small: what recall and numerics are measured on.

`FAMILIES` says how many addressable collectives each family's programs (those that are not `extra`) have on 4 ranks.
"""

from __future__ import annotations

from ..compat import TORCH
from . import attention, dtensor, megatron, mesh
from .base import Built, Program, Setting, scalar_loss

FAMILIES: dict[str, int] = {
    "TP+SP B>=2": 24,
    "TP+SP B=1": 16,
    "TP+SP bias": 8,
    "autocast": 12,
    "llama": 19,
    "TP no-SP": 19,
    "Megatron + inference": 29,
    "dynamic": 20,
    "AC / SAC": 10,
    "einsum, consumers, gather-output": 10,
    "SimpleFSDP": 28,
    "2-D mesh": 20,
    "Ulysses": 40,
    "context parallel": 10,
}
ADDRESSABLE = 265

EVERY_PROGRAM: dict[str, Program] = {
    program.name: program for program in (*dtensor.PROGRAMS, *megatron.PROGRAMS, *mesh.PROGRAMS, *attention.PROGRAMS)
}

# What the installed torch itself gets wrong, with every backend: name -> why.
LEFT_OUT: dict[str, str] = {}
if TORCH < (2, 12):
    for _name in ("c2_autogradfn_inplace_c10d", *attention.IN_PLACE):
        LEFT_OUT[_name] = "torch 2.11 captures autograd.Functions with in-place collectives wrongly"
PROGRAMS = {name: program for name, program in EVERY_PROGRAM.items() if name not in LEFT_OUT}
for _left in (EVERY_PROGRAM[_name] for _name in LEFT_OUT):
    if not _left.extra:
        FAMILIES[_left.family] -= _left.addressable
        ADDRESSABLE -= _left.addressable

__all__ = [
    "ADDRESSABLE",
    "EVERY_PROGRAM",
    "FAMILIES",
    "LEFT_OUT",
    "PROGRAMS",
    "Built",
    "Program",
    "Setting",
    "scalar_loss",
]

"""Parallel programs as people write them, re-created small: what recall and numerics are measured on.

`FAMILIES` says how many addressable collectives each family's programs (those that are not `extra`) have on 4 ranks.
"""

from __future__ import annotations

from . import dtensor, megatron
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
}
ADDRESSABLE = 195

PROGRAMS: dict[str, Program] = {program.name: program for program in (*dtensor.PROGRAMS, *megatron.PROGRAMS)}

__all__ = ["ADDRESSABLE", "FAMILIES", "PROGRAMS", "Built", "Program", "Setting", "scalar_loss"]

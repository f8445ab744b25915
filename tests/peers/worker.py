"""One rank with the packages loaded. Nothing of the suite is imported before DeepSpeed has registered its op (packages.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.peers import packages


def run(folder: Path, names: list[str], options: dict[str, Any]) -> Any:
    """The outcomes of these blocks (numerics_worker.Outcome)."""
    packages.load_yunchang(folder)
    packages.load_deepspeed(folder)
    from tests.numerics_worker import run_programs
    from tests.peers.blocks import PROGRAMS

    return run_programs(names, torch.float32, options, programs=PROGRAMS)

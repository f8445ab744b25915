"""The JSON of a GPU benchmark: where and on what it was measured, and its cases, written as they come."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def environment(device: torch.device, dtype: str) -> dict[str, Any]:
    cuda = device.type == "cuda"
    root = Path(__file__).parents[1]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "gpu": torch.cuda.get_device_name() if cuda else "CPU",
        "ranks": dist.get_world_size(),
        "dtype": dtype,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else "",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else "",
        "nvshmem": _version("nvidia-nvshmem-cu13") or _version("nvidia-nvshmem-cu12"),
        "tilelang": _version("tilelang"),
        "tscompile": _version("tscompile"),
        "commit": _said("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"),
        "python": sys.version.split()[0],
    }


def _said(*command: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""
    return ""


def _version(package: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return ""


class Results:
    """The JSON of one benchmark, written by rank 0 after every step of it, so that a run that ends early is not lost."""

    def __init__(self, path: Path, kind: str, environment: dict[str, Any], resume: bool) -> None:
        self.path = path
        self.data: dict[str, Any] = {"kind": kind, "environment": environment, "cases": []}
        if resume and path.exists():
            self.data["cases"] = json.loads(path.read_text())["cases"]
        dist.barrier()  # nobody writes before all have read

    def has(self, name: str) -> bool:
        """Also true of a case that was started and did not end: it is not tried again."""
        return any(case["name"] == name for case in self.data["cases"])

    def put(self, case: dict[str, Any]) -> None:
        """Add a case, or replace the one of that name."""
        self.data["cases"] = [c for c in self.data["cases"] if c["name"] != case["name"]] + [case]
        if dist.get_rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps(self.data, indent=1) + "\n")
            new.replace(self.path)


def result_path(out: Path, name: str, device: torch.device) -> Path:
    """`out` itself if it names a file, else a name in it from benchmark, GPUs and date."""
    if out.suffix == ".json":
        return out
    gpu = torch.cuda.get_device_name().split()[-1].lower() if device.type == "cuda" else "cpu"
    return out / f"gpu-{name}-{dist.get_world_size()}x{gpu}-{datetime.now(UTC):%Y-%m-%d}.json"

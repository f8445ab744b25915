"""How the GPUs of this host are connected, as the driver's management library (NVML) says; `nvidia-smi topo -p2p n` prints the same.

Whether one GPU can address another one's memory at all is torch's to say: `torch.cuda.can_device_access_peer`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from itertools import permutations
from typing import Any

import torch

from ..errors import TscompileError

_NVLINK, _ATOMICS = 2, 3  # nvmlGpuP2PCapsIndex_t
_OK = 0  # of nvmlReturn_t, and of nvmlGpuP2PStatus_t


def has_fullmesh_nvlink(devices: Sequence[int] | None = None) -> bool:
    """Whether every one of these GPUs reaches every other one over NVLink, directly or through NVSwitch.

    Args:
        devices: their numbers as torch counts them; all that are visible if None. Fewer than two are connected.

    Raises:
        TscompileError: there is no NVIDIA driver, or it does not answer.
    """
    return _all_pairs(devices, _NVLINK)


def supports_p2p_native_atomic(devices: Sequence[int] | None = None) -> bool:
    """Whether atomics of each of these GPUs on memory of every other one are done by the hardware.

    `tl.atomic_add` and `tl.red_add` need it between ranks. NVLink has them, PCI Express has not.

    Args and errors: as `has_fullmesh_nvlink`.
    """
    return _all_pairs(devices, _ATOMICS)


def _all_pairs(devices: Sequence[int] | None, capability: int) -> bool:
    library = _nvml()
    handles = [_handle(library, index) for index in (range(torch.cuda.device_count()) if devices is None else devices)]
    return all(_has(library, one, other, capability) for one, other in permutations(handles, 2))


@lru_cache(maxsize=1)
def _nvml() -> Any:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        raise TscompileError(f"there is no NVIDIA driver here ({error}): run this where the GPUs are") from error
    _call(library, "nvmlInit_v2")
    return library


def _call(library: Any, name: str, *arguments: Any) -> None:
    code = int(getattr(library, name)(*arguments))
    if code != _OK:
        raise TscompileError(f"{name} fails with {code}: does nvidia-smi run here?")


def _handle(library: Any, index: int) -> ctypes.c_void_p:
    """By UUID: NVML counts all GPUs, torch those of CUDA_VISIBLE_DEVICES."""
    handle = ctypes.c_void_p()
    uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}".encode()
    _call(library, "nvmlDeviceGetHandleByUUID", uuid, ctypes.byref(handle))
    return handle


def _has(library: Any, one: ctypes.c_void_p, other: ctypes.c_void_p, capability: int) -> bool:
    status = ctypes.c_int(-1)
    _call(library, "nvmlDeviceGetP2PStatus", one, other, capability, ctypes.byref(status))
    return status.value == _OK

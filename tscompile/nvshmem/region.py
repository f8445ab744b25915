"""One symmetric region per rank of a group, as mapped in this process, and tensors over it.

Not for allocating: provider.py (NVSHMEM) and p2p.py (torch's symmetric memory) do that.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch

from ..errors import HeapError

_CPU, _CUDA = 1, 2  # DLDeviceType
_UINT = 1  # DLDataTypeCode


class DeviceMemory(Protocol):
    """One symmetric region per rank of a group. Ranks are indices within the group; sizes and offsets are in bytes.

    Attributes:
        provider: "nvshmem" or "symm_mem".
        rank: index of this rank.
        size: number of ranks.
        nbytes: size of each region.
        addresses: of each rank's region, as mapped in this process; multiples of 4096.
    """

    provider: str
    rank: int
    size: int
    nbytes: int
    addresses: tuple[int, ...]

    def view(self, owner: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Contiguous tensor on the LOCAL device over the region of `owner`; `offset` is a multiple of the dtype's size."""
        ...

    def release(self) -> None:
        """Give the memory back. The caller has made sure that no kernel of any rank uses it any more."""
        ...


class Provider(Protocol):
    """Where regions of one group come from. Life cycle as that of ShmHeap: prepare, exchange of posts, connect or discard.

    Attributes:
        name: "nvshmem" or "symm_mem".
    """

    name: str

    def prepare(self, nbytes: int, claim: bool) -> dict[str, object]:
        """What this rank posts: JSON-able, with `refusal` (a reason) if it cannot provide `nbytes` per rank.

        Args:
            nbytes: size of the region.
            claim: take the memory now, because nothing better can serve this rank.
        """
        ...

    def connect(self, posts: list[dict[str, object]], nbytes: int) -> DeviceMemory:
        """Map the regions; every rank of the group calls this with the same posts, in rank order.

        Raises:
            HeapError: a region cannot be mapped.
        """
        ...

    def discard(self) -> None:
        """Forget what `prepare` took last, unless `connect` has used it."""
        ...

    def synchronize(self) -> None:
        """Wait until the local device has done all work."""
        ...


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


@cache
def _managed(address: int, nbytes: int, device_type: int, device_id: int) -> _DLManagedTensor:
    # Kept for ever, since torch reads the deleter when the last tensor dies, maybe after the region was released. There is no
    # deleter: tensors do not own the region, and a Python callback could come after the interpreter's end.
    shape = (ctypes.c_int64 * 1)(nbytes)
    tensor = _DLTensor(address, device_type, device_id, 1, _UINT, 8, 1, shape, None, 0)
    return _DLManagedTensor(tensor, None, None)


def bytes_at(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """uint8 tensor over memory that this process does not own, on `device`, usable in and out of inference mode.

    The device is said explicitly, through DLPack: an interface that asks the driver where the address points to
    (`__cuda_array_interface__`) puts a peer's memory on the peer's GPU.
    """
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    kind = _CUDA if device.type == "cuda" else _CPU
    managed = _managed(address, nbytes, kind, device.index or 0)
    with torch.inference_mode(False):
        capsule = new(ctypes.addressof(managed), b"dltensor", None)
        return torch.utils.dlpack.from_dlpack(capsule)


class Region:
    """DeviceMemory over addresses that are mapped already.

    Args:
        provider: name of the provider.
        rank: index of this rank in the group.
        device: the local device, with its index.
        addresses: of each rank's region, in rank order.
        nbytes: size of each region.
        give_back: called once, by `release`.

    Raises:
        HeapError: an address is not aligned to 4096 bytes.
    """

    def __init__(
        self,
        provider: str,
        rank: int,
        device: torch.device,
        addresses: tuple[int, ...],
        nbytes: int,
        give_back: Callable[[], None],
    ) -> None:
        wrong = [index for index, address in enumerate(addresses) if not address or address % 4096]
        if wrong:
            raise HeapError(
                f"{provider} maps the memory of group rank {wrong[0]} at {addresses[wrong[0]]:#x}, which is no address "
                "of whole pages: report this with the output of python -m tscompile.doctor"
            )
        self.provider = provider
        self.rank = rank
        self.size = len(addresses)
        self.nbytes = nbytes
        self.addresses = addresses
        self._device = device
        self._give_back: Callable[[], None] | None = give_back
        self._typed: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def view(self, owner: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if self._give_back is None:
            raise HeapError("this region has been released: take views from the group's present memory")
        base = self._typed.get((owner, dtype))
        if base is None:
            with torch.inference_mode(False):  # an inference tensor could not be written outside inference mode
                base = bytes_at(self.addresses[owner], self.nbytes, self._device).view(dtype)
            self._typed[owner, dtype] = base
        strides = [1] * len(shape)
        for dim in range(len(shape) - 2, -1, -1):
            strides[dim] = strides[dim + 1] * max(shape[dim + 1], 1)
        return base.as_strided(shape, strides, offset // base.element_size())

    def release(self) -> None:
        give_back, self._give_back = self._give_back, None
        self._typed = {}
        if give_back is not None:
            give_back()

"""The one call of the CUDA driver that torch does not offer for every address."""

from __future__ import annotations

import ctypes
from functools import lru_cache

from ..errors import HeapError


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise HeapError("the CUDA driver (libcuda.so.1) cannot be loaded: install NVIDIA's driver") from error


def write_word(address: int, value: int, stream: int) -> None:
    """Write 32 bits to an address that this process has mapped, in stream order. Needs no SM: kernels that wait may fill all of them.

    Args:
        address: of the word, of this GPU or a peer.
        value: unsigned.
        stream: handle of a CUDA stream of the current device.

    Raises:
        HeapError: no driver, or it refuses.
    """
    write = _driver().cuStreamWriteValue32_v2
    result = write(ctypes.c_void_p(stream), ctypes.c_uint64(address), ctypes.c_uint32(value), ctypes.c_uint(0))
    if result:
        raise HeapError(f"CUDA refused to write a word to a GPU (CUresult {result})")

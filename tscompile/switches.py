"""TileScale's two switches in the environment. Nothing needs them here; a value that is set is honoured, or said to be in vain.

TILELANG_USE_NVSHMEM      1: the memory of GPU groups comes from NVSHMEM, as it does by default; a warning says why where it cannot.
                          0: it does not come from NVSHMEM. One rank that says so is enough: the ranks agree on where memory comes from.
TILELANG_USE_DISTRIBUTED  1: kernels may use peers' memory, as they always may. 0: cannot be had, and a warning says so.
"""

from __future__ import annotations

import os

from .errors import OptionError
from .options import BOOLEANS

NVSHMEM = "TILELANG_USE_NVSHMEM"
DISTRIBUTED = "TILELANG_USE_DISTRIBUTED"


def switch(name: str) -> bool | None:
    """What the variable `name` says; None where it is unset or empty.

    Raises:
        OptionError: it is set to something else than a switch can be.
    """
    text = os.environ.get(name, "").strip().lower()
    if not text:
        return None
    if text not in BOOLEANS:
        raise OptionError(f"{name} = {text!r} is not valid: allowed: {', '.join(BOOLEANS)}; or unset it")
    return BOOLEANS[text]

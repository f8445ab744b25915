"""New tensors at the least cost for the host: what generated code of Inductor calls, a third of the time of `new_empty`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._C._dynamo import guards

# Takes sizes, strides and dtype; the memory is not set. A GPU's comes from the current device.
Maker = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]
_MAKERS: dict[str, Maker] = {
    kind: getattr(guards, f"_empty_strided_{kind}")
    for kind in ("cpu", "cuda")
    if hasattr(guards, f"_empty_strided_{kind}")  # torch has no public name for them
}


def maker(device: torch.device) -> Maker:
    """What makes tensors on a device; of a kind with several devices, on the current one."""
    found = _MAKERS.get(device.type)
    if found is not None:
        return found
    return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device)

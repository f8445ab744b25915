"""A loaded kernel, and the values that a launch of it takes: set once for all calls of the same shapes, then patched in place."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Collection, Mapping

from ...language.launch_spec import LaunchSpec
from ...nvshmem.stream import (
    ALIGN_WORDS,
    LAUNCH,
    MADE_WORDS,
    MAX_MAPS,
    MAX_PARAMETERS,
    MAX_RANK,
    NativeKernel,
    Step,
    Values,
)


class Kernel:
    """A kernel of the current CUDA context.

    Its values are the parameters that are numbers or addresses, and the addresses and sizes that its tensor maps are made of.

    Raises:
        ValueError: the kernel has more parameters or tensor maps than a launch can pass.
    """

    def __init__(self, spec: LaunchSpec, function: int) -> None:
        self.spec = spec
        names = [name for name in spec.parameters if name not in spec.maps]
        for tensor in spec.maps.values():
            names += [tensor.tensor, *tensor.dims, *(name for stride in tensor.strides for name in stride)]
        self._places = {name: place for place, name in enumerate(dict.fromkeys(names))}
        if len(spec.parameters) > MAX_PARAMETERS or len(spec.maps) > MAX_MAPS:
            raise ValueError(f"{spec.kernel} has {len(spec.parameters)} parameters and {len(spec.maps)} tensor maps")
        self._native = NativeKernel(
            function=function,
            grid=spec.grid,
            threads=spec.threads,
            shared=spec.shared_bytes,
            values=len(self._places) + 1,
            maps=len(spec.maps),
            parameters=len(spec.parameters),
        )
        numbers = {name: number for number, name in enumerate(spec.maps)}
        for place, name in enumerate(spec.parameters):
            self._native.parameter[place] = -1 - numbers[name] if name in numbers else self._places[name]
        for number, tensor in enumerate(spec.maps.values()):
            native = self._native.map[number]
            for field in ("dtype", "item_bytes", "interleave", "swizzle", "promotion", "fill"):
                setattr(native, field, getattr(tensor, field))
            native.rank, native.tensor = len(tensor.dims), self._places[tensor.tensor]
            padding = MAX_RANK - native.rank
            native.dims[:] = [*(self._places[name] for name in tensor.dims), *[0] * padding]
            for axis in range(MAX_RANK):
                factors = [self._places[name] for name in tensor.strides[axis]] if axis < native.rank - 1 else []
                native.strides[axis][:] = [*factors, *[-1] * (MAX_RANK - len(factors))]
            native.box[:] = [*tensor.box, *[1] * padding]

    def place(self, name: str) -> int:
        """Index of a value; of a spare one if this kernel has no use for it."""
        return self._places.get(name, len(self._places))

    def values(self, known: Mapping[str, float], patched: Collection[str] = ()) -> Values:
        """Values for launches of this kernel, and behind them room for its tensor maps. What it has no use for is left out.

        Args:
            known: values by name.
            patched: names of those that the caller sets before each launch.

        Raises:
            ValueError: a value is neither known nor patched: it would be a null address, or a size of nothing.
        """
        missing = [name for name in self._places if name not in known and name not in patched]
        if missing:
            raise ValueError(f"{self.spec.kernel} needs {', '.join(missing)}")
        values: Values = (ctypes.c_uint64 * (self._native.values + ALIGN_WORDS + MADE_WORDS * len(self.spec.maps)))()
        for name, value in known.items():
            values[self.place(name)] = _bits(float(value)) if name in self.spec.floats else int(value)
        return values

    def step(self, values: Values, stream: int) -> Step:
        """Step that launches it with what `values` hold then; `values` and the kernel must live as long as the step."""
        native = ctypes.addressof(self._native)
        return Step(kind=LAUNCH, stream=stream, src=native, dst=ctypes.addressof(values))


def _bits(value: float) -> int:
    """The 32 bits of a float32."""
    return int.from_bytes(struct.pack("<f", value), "little")

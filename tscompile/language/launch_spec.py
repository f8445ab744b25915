"""What it takes to launch a kernel without TileLang's host code: its parameters and tensor maps, read from that host code.

The host function that TileLang generates checks its arguments, encodes the tensor maps and launches the kernel. It serves any caller,
at some 10 us a call. A caller that makes the same call over and over needs only the last two, with values that it has at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import TscompileError


@dataclass(frozen=True)
class TensorMap:
    """Arguments of cuTensorMapEncodeTiled. Enumerations are those of cuda.h.

    tensor: parameter whose address it is. dims: names of its sizes, innermost first. item_bytes: of an element.
    strides: for each size but the first, the sizes whose product is its stride in elements.
    box: elements of a tile, innermost first.
    """

    tensor: str
    dims: tuple[str, ...]
    strides: tuple[tuple[str, ...], ...]
    item_bytes: int
    box: tuple[int, ...]
    dtype: int
    interleave: int
    swizzle: int
    promotion: int
    fill: int


@dataclass(frozen=True)
class LaunchSpec:
    """How to launch a kernel.

    kernel: its symbol. grid, threads: blocks, and threads of a block. shared_bytes: dynamic shared memory.
    maps: its tensor maps by the parameter's name. parameters: names in order; a name that is not in `maps` is a value.
    floats: those of the parameters that are float32 numbers.
    """

    kernel: str
    grid: int
    threads: int
    shared_bytes: int
    maps: dict[str, TensorMap]
    parameters: tuple[str, ...]
    floats: tuple[str, ...]


def launch_spec(lowered: Any) -> LaunchSpec:
    """The spec of the one kernel of what `tilelang.lower` returned.

    Raises:
        TscompileError: the host code is not of the form known here, so this TileLang is not one that tscompile serves.
    """
    try:
        return _read(lowered)
    except (AttributeError, ValueError, TypeError, AssertionError) as error:
        raise TscompileError(
            f"host code of TileLang of an unknown form ({error}): install a version that tscompile's requirements allow"
        ) from error


def _read(lowered: Any) -> LaunchSpec:
    from tvm.tirx.stmt_functor import post_order_visit

    ((variable, device),) = lowered.device_mod.functions.items()
    (host,) = lowered.host_mod.functions.values()
    name = str(variable.name_hint)
    packed: dict[str, list[list[Any]]] = {}

    def visit(node: Any) -> None:
        if type(node).__name__ == "Call" and len(node.args) and type(node.args[0]).__name__ == "StringImm":
            packed.setdefault(str(node.args[0].value), []).append(list(node.args[1:]))

    post_order_visit(host.body, visit)
    maps = dict(_tensor_map(args) for args in packed.get("__tvm_tensormap_create_tiled", []))
    (call,) = packed[name]
    order = [str(tag) for tag in device.attrs["tirx.kernel_launch_params"]]
    arguments, sizes = call[: -len(order)], dict(zip(order, map(int, call[-len(order) :]), strict=True))
    single = {tag: size for tag, size in sizes.items() if tag.endswith((".y", ".z"))}
    assert set(single.values()) <= {1}, f"a grid or block of several dimensions: {single}"
    return LaunchSpec(
        kernel=name,
        grid=sizes["blockIdx.x"],
        threads=sizes["threadIdx.x"],
        shared_bytes=sizes.get("tirx.use_dyn_shared_memory", 0),
        maps=maps,
        parameters=tuple(_name(argument) for argument in arguments),
        floats=tuple(_name(argument) for argument in arguments if str(argument.dtype) == "float32"),
    )


def _name(argument: Any) -> str:
    assert type(argument).__name__ == "Var", f"{argument} is not a parameter"
    return str(argument.name)


def _tensor_map(args: list[Any]) -> tuple[str, TensorMap]:
    descriptor, dtype, rank, tensor, *rest = args
    rank = int(rank)
    dims, strides, box, steps, last = (
        rest[:rank],
        rest[rank : 2 * rank],
        rest[2 * rank : 3 * rank],
        rest[3 * rank : 4 * rank],
        rest[4 * rank :],
    )
    interleave, swizzle, promotion, fill = map(int, last)
    assert all(int(step) == 1 for step in steps), "a tensor map with gaps"
    item = int(strides[0])
    products = [_product(stride) for stride in strides[1:]]
    assert all(number == item for number, _ in products), f"strides of {tensor} that are no products of sizes"
    return _name(descriptor), TensorMap(
        tensor=_name(tensor),
        dims=tuple(_name(dim) for dim in dims),
        strides=tuple(names for _, names in products),
        item_bytes=item,
        box=tuple(int(size) for size in box),
        dtype=int(dtype),
        interleave=interleave,
        swizzle=swizzle,
        promotion=promotion,
        fill=fill,
    )


def _product(expression: Any) -> tuple[int, tuple[str, ...]]:
    """The number and the names that an expression multiplies."""
    kind = type(expression).__name__
    if kind == "Cast":
        return _product(expression.value)
    if kind == "Mul":
        (a, left), (b, right) = _product(expression.a), _product(expression.b)
        return a * b, left + right
    return (1, (_name(expression),)) if kind == "Var" else (int(expression), ())

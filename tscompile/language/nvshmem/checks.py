"""What a call of this plane may be given, checked where the kernel is written."""

from __future__ import annotations

from typing import Any

from tilelang.language.kernel import KernelLaunchFrame
from tvm import DataType, tirx

from ..addresses import Expr, Operand, address, call, cast, dtype_of, succeeded
from ..context import MAX_RANKS
from ..linking import MARK
from ..sync import Compare
from .enums import Amo, CmpType, Team

_GROUP = (Team.WORLD, Team.SHARED, Team.NODE, Team.GPU_LEADERS)
_ALONE = (Team.SAME_MYPE_NODE, Team.SAME_GPU)
_COMPARE: dict[CmpType, Compare] = {
    CmpType.EQ: "eq",
    CmpType.NE: "ne",
    CmpType.GT: "gt",
    CmpType.LE: "le",
    CmpType.LT: "lt",
    CmpType.GE: "ge",
}


def nv_call(name: str, ctx: Any, *arguments: Expr) -> Expr:
    """A call of the entry point `tsl_x_nv_<name>`.

    Raises:
        ValueError: the kernel that is being written is for CUDA and its prelude lacks NVSHMEM's headers.
    """
    frame = KernelLaunchFrame.Current()
    if frame is not None:
        text = frame.frames[-1].annotations.get("pragma_import_c")
        if text is not None and MARK not in str(text):
            raise ValueError(
                f"nvshmem.{name} needs NVSHMEM's headers in its kernel: "
                "T.Kernel(..., prelude=tl.dialect('cuda', nvshmem='inline').prelude)"
            )
    return call(f"nv_{name}", "int32", address(ctx), *arguments)


def waited(outcome: Expr) -> Expr:
    """The bool that a call with a wait returns."""
    return succeeded(outcome)


def number(value: Expr, what: str) -> Expr:
    """`value`, if it is an integer and not negative where that is known.

    Raises:
        TypeError, ValueError: it is not.
    """
    if isinstance(value, bool | float):
        raise TypeError(f"{what} is {value}: an integer is expected")
    if isinstance(value, tirx.PrimExpr) and "int" not in str(value.dtype):
        raise TypeError(f"{what} is of {value.dtype}: an integer is expected")
    known = int(value) if isinstance(value, int | tirx.IntImm) else 0
    if known < 0:
        raise ValueError(f"{what} is {known}: it cannot be negative")
    return value


def size(num_bytes: Expr) -> Expr:
    """Bytes as uint64."""
    return cast(number(num_bytes, "nbytes"), "uint64")


def rank(pe: Expr, what: str = "pe") -> Expr:
    """A PE as int32.

    Raises:
        ValueError: no group has it.
    """
    number(pe, what)
    if isinstance(pe, int | tirx.IntImm) and int(pe) >= MAX_RANKS:
        raise ValueError(f"{what} is {int(pe)}: a group has at most {MAX_RANKS} PEs, from 0 on")
    return cast(pe, "int32")


def flag(sig_addr: Operand) -> Expr:
    """The address of a signal.

    Raises:
        ValueError: its elements are no words of 64 bits.
    """
    if isinstance(sig_addr, tirx.Buffer | tirx.BufferLoad) and str(sig_addr.dtype) not in ("uint64", "int64"):
        raise ValueError(f"a signal of {sig_addr.dtype}: NVSHMEM's signals are uint64 (or int64, of the same bits)")
    return address(sig_addr)


def operation(sig_op: Amo | int) -> Expr:
    """What a signal does, as int32.

    Raises:
        ValueError: signals do not do that.
    """
    if not isinstance(sig_op, int) or sig_op not in (Amo.SIGNAL_SET, Amo.SIGNAL_ADD):
        raise ValueError(f"sig_op {sig_op!r}: one of Amo.SIGNAL_SET, Amo.SIGNAL_ADD")
    return cast(int(sig_op), "int32")


def comparison(cmp: CmpType | int) -> Compare:
    """How the language calls a comparison.

    Raises:
        ValueError: there is none such.
    """
    if not isinstance(cmp, int) or cmp not in tuple(CmpType):
        raise ValueError(f"cmp {cmp!r}: one of {', '.join(f'CmpType.{name}' for name in CmpType.__members__)}")
    return _COMPARE[CmpType(cmp)]


def team(which: Team | int) -> None:
    """Refuse what is not the group.

    Raises:
        ValueError: no team, one of a single PE, or one that the program has split off.
    """
    allowed = ", ".join(f"Team.{one.name}" for one in _GROUP)
    if not isinstance(which, int) or which not in (*_GROUP, *_ALONE):
        raise ValueError(
            f"team {which!r}: one of {allowed}, which are the ranks of the context's group; "
            "for other ranks make a SymmetricGroup of them"
        )
    if which in _ALONE:
        raise ValueError(
            f"Team.{Team(which).name}: on one host with a GPU for each rank this team is the PE alone, so there is nobody "
            f"to meet: one of {allowed}"
        )


def elements(dest: Operand, src: Operand, nelems: Expr, dtype: str | None) -> Expr:
    """The bytes of `nelems` elements of `dest`, uint64.

    Raises:
        ValueError: elements differ in dtype, or have no whole bytes.
    """
    kind = dtype_of(dest, dtype)
    other = str(src.dtype) if isinstance(src, tirx.Buffer | tirx.BufferLoad) else kind
    if kind != other:
        raise ValueError(
            f"dest is of {kind} and src of {other}: a collective copies elements, it does not convert them"
        )
    bits = DataType(kind).bits * DataType(kind).lanes
    if bits % 8:
        raise ValueError(f"{kind}: elements of whole bytes only; broadcastmem_block counts bytes")
    return cast(number(nelems, "nelems"), "uint64") * tirx.const(bits // 8, "uint64")

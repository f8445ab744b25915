"""Loads and stores of one element of 8 to 64 bits, or of 128 bits at once, with every order and scope that PTX has."""

from __future__ import annotations

from typing import Literal

from .addresses import Expr, Operand, address, call, dtype_of, from_bits, to_bits, width_of
from .dialects import only_cuda

Scope = Literal["cta", "gpu", "sys"]
Semantics = Literal["weak", "volatile", "relaxed", "acquire", "release", "acq_rel"]

LOADS = ("weak", "volatile", "relaxed", "acquire")
STORES = ("weak", "volatile", "relaxed", "release")
WIDE = ("weak", "volatile", "relaxed")


def order(semantics: str, scope: str, allowed: tuple[str, ...]) -> str:
    """The part of an entry point's name that says how an access with a scope is ordered.

    Raises:
        ValueError: the operation does not exist with these semantics or this scope.
    """
    if semantics not in allowed:
        raise ValueError(f"semantics {semantics!r}: one of {', '.join(allowed)}")
    if scope not in ("cta", "gpu", "sys"):
        raise ValueError(f"scope {scope!r}: one of cta, gpu, sys")
    return f"{semantics}_{scope}"


def _form(
    semantics: str, scope: str | None, allowed: tuple[str, ...], no_allocate: bool, non_coherent: bool = False
) -> str:
    """The part of an entry point's name that says which form of ld or st it is.

    Raises:
        ValueError: PTX has no such form; the message says what it has.
    """
    if semantics in ("weak", "volatile") and semantics in allowed:
        if scope is not None:
            raise ValueError(f"scope {scope!r}: {semantics} accesses have none, {' and '.join(allowed[2:])} ones do")
        form = semantics
    else:
        form = order(semantics, "sys" if scope is None else scope, allowed)
    if non_coherent and semantics != "weak":
        raise ValueError(f"non_coherent: weak loads only, not {semantics} ones")
    if no_allocate and semantics == "volatile":
        raise ValueError(f"no_allocate: {', '.join(name for name in allowed if name != 'volatile')}, not volatile")
    return form + "_nc" * non_coherent + "_na" * no_allocate


def _checked(dtype: str) -> str:
    """`dtype`, if the target has it.

    Raises:
        ValueError: a kernel of the C target has no floats of 8 or 16 bits.
    """
    if width_of(dtype) < 32 and "float" in dtype:
        only_cuda(f"{dtype} elements", 'C has no such type: declare the tensor uint8 or int16 and pass dtype="uint16"')
    return dtype


def ld(
    src: Operand,
    semantics: Semantics = "acquire",
    scope: Scope | None = None,
    dtype: str | None = None,
    *,
    no_allocate: bool = False,
    non_coherent: bool = False,
) -> Expr:
    """Load one element, by the calling thread: `ld{.weak,.volatile,.relaxed,.acquire}{.scope}.global{.nc}{.L1::no_allocate}.uN`.

    Use the result exactly once, or store it in a `T.alloc_var`.

    Args:
        src: integer or float of 8, 16, 32 or 64 bits in global memory, aligned to its size. The C target has no floats of 8 or 16
            bits; there pass the dtype of their bits.
        semantics: "acquire" (what the writer released is visible to this thread afterwards), "relaxed" (sees what others write, and
            orders nothing), "volatile" (relaxed for the whole system, never merged or dropped) or "weak" (nobody writes it
            meanwhile; not merged or dropped either).
        scope: of acquire and relaxed: who may write, "cta", "gpu" or "sys" (other GPUs, the host; the default). The others have none.
        dtype: of the element; needed where `src` is an address.
        no_allocate: leave no copy in the L1 cache; not volatile. Nothing on the C target.
        non_coherent: through the read-only path; weak only. The memory must not be written, by anybody, while the kernel runs.
            Nothing on the C target.

    Raises:
        ValueError: a form or dtype that loads do not have.
    """
    dtype = _checked(dtype_of(src, dtype))
    form, bits = _form(semantics, scope, LOADS, no_allocate, non_coherent), width_of(dtype)
    return from_bits(call(f"ld_{form}_u{bits}", f"uint{bits}", address(src)), dtype)


def st(
    dst: Operand,
    value: Expr,
    semantics: Semantics = "release",
    scope: Scope | None = None,
    dtype: str | None = None,
    *,
    no_allocate: bool = False,
) -> Expr:
    """Store one element, by the calling thread: `st{.weak,.volatile,.relaxed,.release}{.scope}.global{.L1::no_allocate}.uN`.

    Args:
        dst: as `src` of `ld`.
        value: cast to the dtype of `dst`.
        semantics: "release" (what this thread wrote or has seen is visible to who acquires the value), "relaxed", "volatile" or
            "weak" (nobody reads it before a later release), as in `ld`.
        scope: of release and relaxed: who may read, as in `ld`.
        dtype: of the element; needed where `dst` is an address.
        no_allocate: as in `ld`.

    Raises:
        ValueError: a form or dtype that stores do not have.
    """
    dtype = _checked(dtype_of(dst, dtype))
    form, bits = _form(semantics, scope, STORES, no_allocate), width_of(dtype)
    return call(f"st_{form}_u{bits}", "int32", address(dst), to_bits(value, dtype))


def _wide(semantics: str) -> tuple[str, ...]:
    """The semantics that 128 bits have.

    Raises:
        ValueError: `semantics` orders accesses.
    """
    if semantics in ("acquire", "release"):
        raise ValueError(
            f"semantics {semantics!r}: 128 bits are four accesses without an order among them, so none of them can publish the "
            f"others: {', '.join(WIDE)}, beside a flag that is {semantics}d"
        )
    return WIDE


def ld128(
    to: Operand,
    src: Operand,
    semantics: Semantics = "weak",
    scope: Scope | None = None,
    *,
    no_allocate: bool = False,
    non_coherent: bool = False,
) -> Expr:
    """Load 16 bytes in one instruction, by the calling thread: `ld….v4.u32`, whatever the dtypes.

    Four words without an order among them: another thread's 16 bytes may be seen in part.

    Args:
        to: 16 bytes of this thread's own (`T.alloc_local`), which stay in registers; no particular alignment.
        src: global memory, aligned to 16 bytes.
        semantics: "weak", "volatile" or "relaxed", as in `ld`.
        scope, no_allocate, non_coherent: as in `ld`.

    Raises:
        ValueError: a form that such loads do not have.
    """
    form = _form(semantics, scope, _wide(semantics), no_allocate, non_coherent)
    return call(f"ld_{form}_u128", "int32", address(to), address(src))


def st128(
    dst: Operand,
    value: Operand,
    semantics: Semantics = "weak",
    scope: Scope | None = None,
    *,
    no_allocate: bool = False,
) -> Expr:
    """Store 16 bytes in one instruction, by the calling thread: `st….v4.u32`; the mirror of `ld128`.

    Args:
        dst: global memory, of this rank or of a peer, aligned to 16 bytes.
        value: as `to` of `ld128`.
        semantics, scope, no_allocate: as in `ld128`.

    Raises:
        ValueError: a form that such stores do not have.
    """
    form = _form(semantics, scope, _wide(semantics), no_allocate)
    return call(f"st_{form}_u128", "int32", address(dst), address(value))

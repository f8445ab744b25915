"""Defects of TileLang that the kernels here are written around. Each test fails once its defect is gone (strict xfail), or once a
work-around stops working."""

# No postponed annotations here: TileLang evaluates those of a prim_func where it stands.

import re

import pytest
import tilelang
import tilelang.language as T
import tvm

import tscompile.language as tl

TARGET = {"kind": "cuda", "arch": "sm_90a"}


def lowered(function: object) -> str:
    target = tvm.target.Target(TARGET)
    with target:
        source = str(tilelang.lower(function, target=target).kernel_source)
    return source[source.find('extern "C" __global__') :]


def two_loops(clear_inside: bool):
    """One accumulator over an outer loop of pipelined loops."""

    @T.prim_func
    def kernel(
        a: T.Tensor((64, 512), "bfloat16"), b: T.Tensor((512, 64), "bfloat16"), c: T.Tensor((64, 64), "float32")
    ):
        with T.Kernel(1, threads=128) as _:
            a_tile = T.alloc_shared((64, 64), "bfloat16")
            b_tile = T.alloc_shared((64, 64), "bfloat16")
            total = T.alloc_fragment((64, 64), "float32")
            if not clear_inside:
                T.clear(total)
            for outer in T.serial(2):
                if clear_inside and outer == 0:
                    T.clear(total)
                for k in T.Pipelined(4, num_stages=2):
                    T.copy(a[0, outer * 256 + k * 64], a_tile)
                    T.copy(b[outer * 256 + k * 64, 0], b_tile)
                    T.gemm(a_tile, b_tile, total)
            T.copy(total, c)

    return kernel


def cleared_in_every_turn(source: str) -> bool:
    """Whether the outer loop clears the accumulator without asking which turn it is."""
    _, loop, body = source.partition("for (int outer")
    if not loop or "broadcast_var" not in source:
        pytest.fail(f"the generated code has another shape: look at it again\n{source}")
    return "broadcast_var" in body and "outer == 0" not in body[: body.index("broadcast_var")]


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="tilelang 0.1.15 clears an accumulator again in every turn of an outer loop",
)
def test_an_accumulator_that_is_cleared_before_the_outer_loop() -> None:
    assert not cleared_in_every_turn(lowered(two_loops(clear_inside=False)))


def test_an_accumulator_that_is_cleared_in_the_first_turn() -> None:
    assert not cleared_in_every_turn(lowered(two_loops(clear_inside=True)))


def flags_far_apart(through):
    """An address whose index has a constant factor with bit 15 set."""

    @T.prim_func
    def kernel(x: T.Tensor((512, 512), "float32"), out: T.Tensor((1,), "float32")):
        with T.Kernel(8, threads=32, prelude=tl.prelude("cuda")) as block:
            if T.get_thread_binding() == 0:
                out[0] = T.call_extern("float32", "__int_as_float", T.cast(through(x[block * 64, 0]), "int32"))

    return kernel


@pytest.mark.xfail(
    strict=True, raises=tvm.error.InternalError, reason="tilelang 0.1.15 cannot lower T.address_of with such an index"
)
def test_address_of() -> None:
    assert "x[" in lowered(flags_far_apart(lambda x: T.reinterpret(T.address_of(x), "uint64")))


def test_access_ptr_in_its_place() -> None:
    assert "&(x[" in lowered(flags_far_apart(lambda x: tl.ld(x, dtype="uint32")))


def sizes_of_two(bind: bool):
    """Two parameters whose sizes the host reads; a Python loop that gives both one name, or takes them where they stand."""
    n0, n1 = T.dynamic("n0"), T.dynamic("n1")

    @T.prim_func
    def kernel(x0: T.Tensor((n0,), "float32"), x1: T.Tensor((n1,), "float32"), out: T.Tensor((2,), "float32")):
        with T.Kernel(1, threads=32) as _:
            if T.get_thread_binding() == 0:
                if bind:
                    for i, x in enumerate((x0, x1)):
                        out[i] = x[0]
                else:
                    for i in (0, 1):
                        out[i] = (x0, x1)[i][0]

    return kernel


def shapes_read(function: object) -> list[str]:
    """What the host code takes the sizes from: one entry for each of n0 and n1."""
    target = tvm.target.Target(TARGET)
    with target:
        host = tilelang.lower(function, target=target).host_mod.script()
    found = re.findall(r"n[01](?:_\d)?: T\.int32 = T\.Cast\(\"int32\", (\w+)\[0\]\)", host)
    if len(found) != 2:
        pytest.fail(f"the generated code has another shape: look at it again\n{host}")
    return found


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="tilelang 0.1.15 reads one parameter's shape for all that a Python loop binds to one name",
)
def test_parameters_that_a_loop_binds() -> None:
    assert len(set(shapes_read(sizes_of_two(bind=True)))) == 2


def test_parameters_that_a_loop_takes_where_they_stand() -> None:
    assert len(set(shapes_read(sizes_of_two(bind=False)))) == 2

"""Every kernel that the GPU tests and the benchmark launch, compiled to a cubin, and their plans. No GPU needed."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import tscompile.language as tl
from benchmarks import bench_language
from tscompile.language.addresses import cast
from tscompile.language.compile import compile_lowered, lower
from tscompile.language.launch_spec import LaunchSpec, launch_spec
from tscompile.templates.nvlink.launch import Kernel

from . import forms, plans
from .copy_kernels import COLUMNS, TILE
from .forms import Form

BENCH = [(way, *shape) for way in bench_language.WAYS for shape in bench_language.OURS]


@pytest.fixture(scope="module")
def kernels(request: pytest.FixtureRequest) -> dict[Form, tuple[bytes, LaunchSpec]]:
    """Those of the tests that run, compiled in few runs of nvcc: form -> what `forms.cubin` makes one by one."""
    here = (item for item in request.session.items if item.getparent(pytest.Module) is request.node)
    calls = [item.callspec.params for item in here if "kernels" in getattr(item, "fixturenames", ())]
    wanted = list(dict.fromkeys(call["form"] for call in calls))
    lowered = [forms.lowered(form) for form in wanted]
    made = zip(compile_lowered(lowered), map(launch_spec, lowered), strict=True)
    return dict(zip(wanted, ((artifact.cubin, spec) for artifact, spec in made), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("form", forms.FORMS, ids=lambda form: "-".join(map(str, form)))
def test_kernels_of_the_gpu_tests(kernels: dict[Form, tuple[bytes, LaunchSpec]], form: Form) -> None:
    """And what launches them finds a value for every parameter."""
    cubin, spec = kernels[form]
    assert cubin[:4] == b"\x7fELF" and spec.kernel.encode() in cubin
    function = forms.written(tl.dialect("cuda"), form)
    buffers = function.buffer_map
    names = {str(buffers[p].name) if p in buffers else str(p.name) for p in function.params}
    assert set(spec.parameters) <= names and not spec.maps and not spec.floats
    kernel = Kernel(spec, 0)
    assert kernel.values(dict.fromkeys(names, -1))[: len(spec.parameters)] == [(1 << 64) - 1] * len(spec.parameters)


@pytest.mark.slow
@pytest.mark.parametrize("form", [("who",)])
def test_a_kernel_as_the_gpu_tests_compile_it(kernels: dict[Form, tuple[bytes, LaunchSpec]], form: Form) -> None:
    cubin, spec = forms.cubin(form)
    assert cubin[:4] == b"\x7fELF" and f"{spec.kernel}\0".encode() in cubin and spec == kernels[form][1]


@pytest.mark.slow
def test_kernels_of_the_benchmark() -> None:
    lowered = [lower(bench_language.copy_kernel(*form)) for form in BENCH]
    for form, artifact, spec in zip(BENCH, compile_lowered(lowered), map(launch_spec, lowered), strict=True):
        assert artifact.cubin[:4] == b"\x7fELF" and artifact.spill_bytes == artifact.stack_bytes == 0
        assert (spec.grid, spec.threads, set(spec.parameters)) == (*form[1:], {"dst", "src", "size"})
    assert bench_language.built(*BENCH[-1])[1] == spec
    plain = bench_language.plain_cubin()
    for shape in bench_language.PLAIN:
        spec = bench_language.plain_spec(*shape)
        assert f"{spec.kernel}\0".encode() in plain
        Kernel(spec, 0).values({"dst": 1, "src": 2, "count": 3})


def test_what_the_benchmark_reports() -> None:
    names = [
        f"{way} {side}" for way in bench_language.WAYS for side in ("plain 1x1", "plain 2x2", "ours 1x1", "ours 2x2")
    ]
    rounds = [dict(zip(names, [2.0 + i, 3.0, 9.0, 2.5 + i, 1.0, 1.0, 1.0, 1.0], strict=True)) for i in (0, 0.1, 0.2)]
    put, _ = cases = [bench_language.summary(way, rounds, 1 << 30) for way in bench_language.WAYS]
    assert put["best"] == {"plain": "put_block plain 1x1", "ours": "put_block ours 2x2"}
    assert put["of_peak"]["value"] == pytest.approx(2.1 / 2.6)
    assert bench_language.lines(put)[0].startswith("put_block, 1024 MiB: 0.808 of the peak [")
    assert cases[1]["of_peak"]["value"] == 1


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize(("jobs", "unit", "largest"), [(forms.JOBS, 1, 1 << 40), (forms.TILES, 16, TILE)])
def test_plans(ranks: int, jobs: int, unit: int, largest: int) -> None:
    """Copies stay in their writer's share, do not touch each other, and have all alignments."""
    layout = plans.Layout(ranks, 144 << 20)
    for rank in range(ranks):
        planned = plans.plan(layout, rank, jobs, rank, unit, largest)
        begin, end = layout.share(rank)
        assert len(planned) == jobs and plans.table(planned).shape == (jobs, COLUMNS)
        assert end <= layout.data_bytes and begin >= layout.source_bytes
        for job in planned:
            assert begin <= job.at and job.at + job.size <= end and 0 <= job.start <= layout.source_bytes - job.size
            assert job.size % unit == job.at % unit == job.start % unit == 0 and job.size <= largest
        for to in range(ranks):
            here = sorted((job for job in planned if job.to == to), key=lambda job: job.at)
            assert all(a.at + a.size < b.at for a, b in pairwise(here))
        residues = {(job.at // unit % 16, job.start // unit % 16) for job in planned}
        assert len(residues) >= min(jobs, 256) * (1 if unit == 1 else 0.9)


def test_faults_are_found_and_explained() -> None:
    layout = plans.Layout(2, 1 << 16)
    planned = [[plans.Job(1, 9000, 0, 5, 10, 2)], [plans.Job(1, 40000, 0, 1, 3, 1)]]
    sources = [plans.source(layout, rank) for rank in range(2)]
    data = torch.empty(layout.data_bytes, dtype=torch.uint8)
    plans.prepare(layout, data, sources[1])
    for job in (planned[0][0], planned[1][0]):
        data[job.at : job.at + job.size] = sources[0][job.start : job.start + job.size]
    assert plans.faults(layout, 1, data, planned, sources) == ""
    data[9010] ^= 1
    assert "1 bytes of rank 1 are wrong:\nbyte 9010 is 164, not 165: [\"rank 0's put_warp" in plans.faults(
        layout, 1, data, planned, sources
    )


@pytest.mark.parametrize("dtype", ["uint8", "uint32", "uint64"])
def test_negative_numbers_for_unsigned_words(dtype: str) -> None:
    """TVM refuses such constants; `signal(flag, -1, "add")` needs them."""
    bits = int(dtype[4:])
    for value in (-1, forms.kernels.T.int32(-1)):
        assert str(cast(value, dtype)) == str(cast((1 << bits) - 1, dtype))
    assert int(cast(-1, "int32")) == -1

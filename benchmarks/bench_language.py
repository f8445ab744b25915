"""put_block and get_block of tscompile.language against what the SMs can push and pull over NVLink.

    torchrun --nproc-per-node 2 -m benchmarks.bench_language [--mib 64] [--rounds 9] [--out DIR or FILE.json]

Run it from the root of the repository. Each rank writes to the next one, or reads from it, all at once. The peak is the best of
several launches of plain CUDA kernels that copy 16 bytes a thread with several loads in flight; the primitives run in several launches
too, and the best of each side are compared within rounds. What was copied is checked first.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import gpu_harness as gpu
from benchmarks import gpu_results, harness
from tscompile.language.launch_spec import LaunchSpec
from tscompile.nvshmem import stream
from tscompile.nvshmem.device import CONTROL_BYTES, SLOTS, NvlinkHeap
from tscompile.templates.nvlink import jit
from tscompile.templates.nvlink.launch import Kernel

SEED = 0
WAYS = ("put_block", "get_block")
PLAIN = [(66, 512, 4), (132, 512, 4), (132, 512, 8), (132, 1024, 4), (132, 1024, 8), (264, 512, 8)]
"""Launches of the plain kernel: blocks, threads, loads in flight of a thread."""
OURS = [(66, 512), (132, 512), (132, 1024), (264, 512)]

PLAIN_SOURCE = """
template <int N> __device__ __forceinline__ void copy(uint4 *dst, const uint4 *src, unsigned long long count) {
  const unsigned long long stride = (unsigned long long)gridDim.x * blockDim.x;
  unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;
  for (; i + (N - 1) * stride < count; i += N * stride) {
    uint4 v[N];
    #pragma unroll
    for (int k = 0; k < N; ++k) v[k] = src[i + k * stride];
    #pragma unroll
    for (int k = 0; k < N; ++k) dst[i + k * stride] = v[k];
  }
  for (; i < count; i += stride) dst[i] = src[i];
}
#define PLAIN(N) extern "C" __global__ void __launch_bounds__(1024) plain##N(uint4 *__restrict__ dst, \\
    const uint4 *__restrict__ src, unsigned long long count) { copy<N>(dst, src, count); }
PLAIN(4) PLAIN(8)
"""


def copy_kernel(way: str, blocks: int, threads: int) -> Any:
    """A slab of whole 16 bytes for each block, copied by `way`."""
    import tilelang.language as T

    import tscompile.language as tl

    copy = getattr(tl, way)

    @T.prim_func
    def language_copy_kernel(dst: T.int64, src: T.int64, size: T.int64):
        with T.Kernel(blocks, threads=threads, prelude=tl.prelude("cuda")) as block:
            thread = T.get_thread_binding()
            slab = (size // 16 + blocks - 1) // blocks * 16
            at = slab * block
            if at < size:
                copy(tl.pointer(dst + at), tl.pointer(src + at), T.min(slab, size - at), thread, threads)

    return language_copy_kernel


def plain_cubin() -> bytes:
    from tscompile.language.toolchain import nvcc

    with tempfile.TemporaryDirectory(prefix="tscompile-") as folder:
        source, cubin = Path(folder) / "plain.cu", Path(folder) / "plain.cubin"
        source.write_text(PLAIN_SOURCE)
        command = [str(nvcc()), "-cubin", "-O3", "-arch=sm_90a", "-o", str(cubin), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        return cubin.read_bytes()


def built(way: str, blocks: int, threads: int) -> tuple[bytes, LaunchSpec]:
    """The compiled `copy_kernel`, from the cache if it is there."""

    def build() -> tuple[bytes, LaunchSpec]:
        from tscompile.language.compile import build_cubin

        return build_cubin(copy_kernel(way, blocks, threads))

    recipe = f"{way} {blocks} {threads} {Path(__file__).read_text()}"
    return jit.kept(f"bench-{way}", recipe, build)


def plain_spec(blocks: int, threads: int, depth: int) -> LaunchSpec:
    return LaunchSpec(f"plain{depth}", blocks, threads, 0, {}, ("dst", "src", "count"), ())


def issue(steps: stream.Steps) -> None:
    """On the current stream, for all steps that name stream 0."""
    queues = stream.Queues()
    queues.streams[0] = torch.cuda.current_stream().cuda_stream
    stream.load().issue(steps, ctypes.c_void_p(ctypes.addressof(queues)))


def launcher(kernel: Kernel, **values: int) -> Callable[[], None]:
    filled = kernel.values(values)
    steps = stream.steps_of(kernel.step(filled, 0))

    def launch() -> None:
        issue(steps)

    launch.keeps = (kernel, filled)  # type: ignore[attr-defined]  # the steps point at them
    return launch


def launchers(
    nbytes: int, own: int, peer: int, shapes: Sequence[tuple[int, int]] = OURS
) -> dict[str, Callable[[], None]]:
    """Copies of `nbytes`: pushes from `own` to `peer` + nbytes, pulls from `peer` to `own` + nbytes. Names begin with the way.

    `shapes`: launches of the primitives, beside those of the plain kernels.
    """
    with ThreadPoolExecutor(8) as pool:
        plain = pool.submit(plain_cubin)
        ours = {(way, *shape): pool.submit(built, way, *shape) for way in WAYS for shape in shapes}
    driver, sides = stream.load(), {}
    for way in WAYS:
        dst, src = (peer + nbytes, own) if way == "put_block" else (own + nbytes, peer)
        for shape in PLAIN:
            spec = plain_spec(*shape)
            kernel = Kernel(spec, driver.load_kernel(plain.result(), spec.kernel, 0))
            name = f"{way} plain {shape[0]}x{shape[1]}, {shape[2]} in flight"
            sides[name] = launcher(kernel, dst=dst, src=src, count=nbytes // 16)
        for shape in shapes:
            cubin, spec = ours[way, *shape].result()
            kernel = Kernel(spec, driver.load_kernel(cubin, spec.kernel, spec.shared_bytes))
            sides[f"{way} ours {shape[0]}x{shape[1]}"] = launcher(kernel, dst=dst, src=src, size=nbytes)
    return sides


def check(sides: dict[str, Callable[[], None]], data: torch.Tensor, wanted: dict[str, torch.Tensor]) -> None:
    """Every side copies everything.

    Raises:
        RuntimeError: one does not, on some rank.
    """
    wrong = []
    for name, launch in sides.items():
        data.zero_()
        torch.cuda.synchronize()
        dist.barrier()
        launch()
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()
        if not torch.equal(data, wanted[name.split()[0]]):
            wrong.append(name)
    if gpu.on_any_rank(bool(wrong)):
        raise RuntimeError(f"wrong bytes on this rank, or on another: {wrong}")


def measure(
    rows: Sequence[torch.Tensor], rank: int, timer: gpu.Timer, nbytes: int, rounds: int
) -> list[dict[str, Any]]:
    """A case for each way. Every rank calls this.

    Args:
        rows: memory of each rank as mapped here, bytes, 2 * `nbytes` or more; all of it is overwritten.
    """
    size = len(rows)
    to, source = (rank + 1) % size, (rank - 1) % size
    texts = [
        torch.randint(-(2**62), 2**62, (nbytes // 8,), generator=torch.Generator().manual_seed(owner)).view(torch.uint8)
        for owner in range(size)
    ]
    rows[rank][:nbytes].copy_(texts[rank])
    wanted = {"put_block": texts[source].to(rows[rank].device), "get_block": texts[to].to(rows[rank].device)}
    sides = launchers(nbytes, rows[rank].data_ptr(), rows[to].data_ptr())
    check(sides, rows[rank][nbytes : 2 * nbytes], wanted)
    race = gpu.race({name: gpu.Side(run) for name, run in sides.items()}, timer, rounds, SEED, graphs=False)
    if race.failures:
        raise RuntimeError(f"a copy failed: {race.failures}")
    return [summary(way, race.eager, nbytes) for way in WAYS]


def summary(way: str, rounds: Sequence[dict[str, float]], nbytes: int) -> dict[str, Any]:
    """GB/s of each side of a way, and how the best of ours compares with the best plain one, round by round."""
    seconds = {
        name: statistics.median(times[name] for times in rounds) for name in rounds[0] if name.startswith(f"{way} ")
    }
    best = {
        kind: min((name for name in seconds if name.startswith(f"{way} {kind} ")), key=seconds.__getitem__)
        for kind in ("plain", "ours")
    }
    return {
        "name": way,
        "bytes": nbytes,
        "gbytes_per_s": {name: nbytes / s / 1e9 for name, s in seconds.items()},
        "best": best,
        "of_peak": harness.bootstrap(
            rounds, lambda sample: harness.paired_ratio(sample, best["plain"], best["ours"])
        ).to_dict(),
        "rounds": [{name: times[name] for name in seconds} for times in rounds],
    }


def lines(case: dict[str, Any]) -> list[str]:
    share = case["of_peak"]
    return [
        f"{case['name']}, {case['bytes'] >> 20} MiB: {share['value']:.3f} of the peak [{share['low']:.3f}, {share['high']:.3f}]",
        *(f"  {speed:6.1f} GB/s  {name}" for name, speed in sorted(case["gbytes_per_s"].items(), key=lambda x: -x[1])),
    ]


def connected_heap(rank: int, size: int, device: torch.device, nbytes: int) -> tuple[NvlinkHeap, list[torch.Tensor]]:
    """A heap over all ranks of the world, and `nbytes` or more of each rank's memory as mapped here."""
    heap = NvlinkHeap(rank, size, device, ranks=tuple(range(size)))
    posts: list[Any] = [None] * size
    dist.all_gather_object(posts, heap.prepare(-(-nbytes // SLOTS)))
    heap.connect(posts)
    dist.barrier()
    torch.cuda.synchronize()
    heap.release_names()
    shape = (SLOTS * heap.half_bytes,)
    return heap, [heap.memory.view(owner, CONTROL_BYTES, shape, torch.uint8) for owner in range(size)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=64, help="bytes of a copy")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR or FILE.json")
    args = parser.parse_args(argv)
    device = gpu.start("cuda")
    with gpu.limit(240.0):
        path = gpu_results.result_path(args.out, "language", device)
        results = gpu_results.Results(path, "gpu-language", gpu_results.environment(device, "bytes"), False)
        heap, rows = connected_heap(dist.get_rank(), dist.get_world_size(), device, 2 * args.mib << 20)
        for case in measure(rows, dist.get_rank(), gpu.Timer(device), args.mib << 20, args.rounds):
            results.put(case | {"provider": heap.provider})
            gpu.say(*lines(case), sep="\n    ")
        if dist.get_rank() == 0:
            print(f"\nwrote {results.path}", json.dumps(results.data["environment"]), flush=True)
    gpu.finish()
    return 0


if __name__ == "__main__":
    sys.exit(gpu.guarded(main))

"""Barriers among blocks. cuda_grid.h compiled for the host: threads stand for blocks of one thread, atomics for PTX.

No GPU needed; test_cuda.py sees to the PTX."""

import subprocess
from pathlib import Path

import pytest

import tscompile.language as tl
from tscompile.language import dialects

from . import kernels

HARNESS = """
#include <cassert>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>
#define TSL static inline
typedef uint64_t TslAddress;
struct TslContext { uint64_t rank, timeout_ns, gave_up[4]; uint32_t aborted; };
TSL TslContext *tsl_context(const void *c) { return (TslContext *)c; }
TSL bool tsl_aborted(const void *c) { return __atomic_load_n(&tsl_context(c)->aborted, __ATOMIC_RELAXED) != 0; }
TSL uint64_t tsl_now_ns() {
  std::this_thread::yield();
  return std::chrono::steady_clock::now().time_since_epoch().count();
}
TSL void tsl_give_up(const void *context, int peer, uint32_t site, uint64_t expected, uint64_t seen) {
  TslContext *c = tsl_context(context);
  if (__atomic_exchange_n(&c->aborted, 1u, __ATOMIC_ACQ_REL)) return;
  c->gave_up[0] = peer; c->gave_up[1] = site; c->gave_up[2] = expected; c->gave_up[3] = seen;
}
TSL uint64_t tsl_x_atom_add_release_gpu_u64(TslAddress p, uint64_t v) {
  return __atomic_fetch_add((uint64_t *)p, v, __ATOMIC_RELEASE);
}
TSL uint64_t tsl_x_ld_acquire_gpu_u64(TslAddress p) { return __atomic_load_n((uint64_t *)p, __ATOMIC_ACQUIRE); }
TSL uint32_t tsl_lane() { return 0; }
TSL void __syncwarp() {}
TSL int __shfl_sync(uint32_t, int v, int) { return v; }
#include "cuda_grid.h"
int main(int count, char **arguments) {
  const uint32_t blocks = atoi(arguments[1]), rounds = atoi(arguments[2]), missing = atoi(arguments[3]);
  uint64_t word = strtoull(arguments[4], nullptr, 0);
  TslContext context{3, missing ? 100000000ull : 60000000000ull, {}, 0};
  std::vector<uint32_t> cells(blocks), failed(blocks), wrong(blocks);
  std::vector<std::thread> threads;
  for (uint32_t block = missing; block < blocks; ++block)
    threads.emplace_back([&, block] {
      for (uint32_t round = 1; round <= rounds && !failed[block]; ++round) {
        cells[block] = round;   // plain: ordered by the barrier alone
        failed[block] = !tsl_x_grid_sync((TslAddress)&context, (TslAddress)&word, blocks, block, 9);
        for (uint32_t other = 0; other < blocks && !failed[block]; ++other) wrong[block] += cells[other] != round;
        failed[block] |= !tsl_x_grid_sync((TslAddress)&context, (TslAddress)&word, blocks, block, 9);
      }
    });
  for (std::thread &thread : threads) thread.join();
  uint32_t sums[2] = {0, 0};
  for (uint32_t block = 0; block < blocks; ++block) sums[0] += wrong[block], sums[1] += failed[block];
  printf("%u %u %llu", sums[0], sums[1], (unsigned long long)word);
  for (uint64_t value : context.gave_up) printf(" %llu", (unsigned long long)value);
}
"""


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    (folder / "main.cpp").write_text(HARNESS)
    include = f"-I{Path(dialects.__file__).parent}"
    command = ["g++", "-std=c++17", "-O1", "-pthread", include, "-o", str(folder / "main"), str(folder / "main.cpp")]
    subprocess.run(command, check=True, timeout=100)
    return folder / "main"


def printed(harness: Path, *arguments: int) -> list[int]:
    command = [str(harness), *map(str, arguments)]
    return [
        int(number) for number in subprocess.run(command, check=True, capture_output=True, timeout=100).stdout.split()
    ]


@pytest.mark.parametrize("blocks", [1, 2, 5])
@pytest.mark.parametrize("epochs_over", [0, 7, 2**31 - 50, 2**32 - 50])
def test_all_blocks_meet_again_and_again(harness: Path, blocks: int, epochs_over: int) -> None:
    wrong, failed, word, *record = printed(harness, blocks, 100, 0, epochs_over << 32)
    assert (wrong, failed, record) == (0, 0, [0] * 4)
    assert word == (epochs_over + 200) % 2**32 << 32  # nothing is left of the arrivals


@pytest.mark.parametrize("missing", [1, 2])
def test_a_block_that_never_comes(harness: Path, missing: int) -> None:
    """Arriver 0 among them. Those that wait get through with a failure, and the first leaves the record."""
    wrong, failed, _, *record = printed(harness, 4, 3, missing, 6 << 32)
    assert (wrong, failed, record) == (0, 4 - missing, [3, 9, 7, 6])


def test_not_on_the_c_target() -> None:
    with pytest.raises(ValueError, match=r"grid_sync: not on the C target .* blocks run one after another"):
        kernels.grid(tl.dialect("cpu"))

    d = tl.dialect("cpu")
    for call in (lambda ctx, word: tl.gpu_arrive(word[0], 1, 0), lambda ctx, word: tl.gpu_wait(ctx, word[0], 1)):
        with pytest.raises(ValueError, match=r"gpu_(arrive|wait): not on the C target .* blocks run one after another"):
            written(d, call)


def written(d: dialects.Dialect, call):
    @kernels.T.prim_func
    def kernel(ctx: kernels.CTX, word: kernels.T.Tensor((1,), "int64")):
        with kernels.T.Kernel(1, threads=32, prelude=d.prelude) as _:
            call(ctx, word)

    return kernel

"""What a call of the CUDA driver takes the host, for each kind that a fused op makes (tscompile/nvshmem/stream.c), and a torch.mm.

    python -m benchmarks.driver_calls

Copies and flags go to a second GPU if there is one. The constants of templates/nvlink/projected.py are such numbers; on a machine whose
calls are as slow as a virtual machine's they decide how many chunks are worth it.

Traps: a stream holds about a thousand entries, then a call waits for the GPU. So few are issued at a time, and the GPU is waited for
between them; the least of the rounds counts.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Sequence

import torch

from tscompile.nvshmem import stream
from tscompile.nvshmem.stream import Driver, Queues, Step, steps_of

MAIN, SIDE = 0, 1
CALLS, ROUNDS = 48, 50
ROWS, WIDTH, PITCH = 64, 2048, 8192


def kinds(source: int, target: int) -> dict[str, list[Step]]:
    """The steps of CALLS calls of each kind; `source` and `target` are addresses of ROWS * PITCH bytes."""
    copy = Step(kind=stream.COPY, stream=SIDE, dst=target, src=source, bytes=WIDTH)
    rows = Step(
        kind=stream.COPY_ROWS,
        stream=SIDE,
        dst=target,
        src=source,
        bytes=WIDTH,
        rows=ROWS,
        dst_pitch=WIDTH,
        src_pitch=PITCH,
    )
    flags = [Step(kind=stream.WRITE, stream=SIDE, dst=target + 4 * i, value=1) for i in range(3)]
    record = Step(kind=stream.RECORD, stream=MAIN, event=0)
    wait = Step(kind=stream.AWAIT, stream=SIDE, event=0)
    return {
        "copy": [copy] * CALLS,
        "copy of rows": [rows] * CALLS,
        "copy and flag": [copy, flags[0]] * (CALLS // 2),
        "copy and three flags": [copy, *flags] * (CALLS // 2),  # flags that follow one another are one call
        "record and await": [record, wait] * (CALLS // 2),
    }


def measure(driver: Driver, queues: Queues, steps: Sequence[Step], rounds: int = ROUNDS) -> float:
    """Microseconds of a call, where `steps` are CALLS calls."""
    pointer, made, least = ctypes.c_void_p(ctypes.addressof(queues)), steps_of(*steps), float("inf")
    for _ in range(rounds):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begin = time.perf_counter()
        driver.issue(made, pointer)
        least = min(least, time.perf_counter() - begin)
    return 1e6 * least / CALLS


def matmul_us() -> float:
    """Of torch's matmul, as a chunk is computed; small, so that the GPU keeps up."""
    a, b = (torch.randn(256, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    least = float("inf")
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(CALLS):
            torch.mm(a, b.t())
        least = min(least, time.perf_counter() - begin)
    return 1e6 * least / CALLS


def main() -> int:
    if not torch.cuda.is_available():
        print("needs an NVIDIA GPU")
        return 1
    source = torch.zeros(ROWS * PITCH, dtype=torch.uint8, device="cuda:0")
    target = source.to(f"cuda:{torch.cuda.device_count() > 1:d}", copy=True)  # torch opens the way between the GPUs
    driver = stream.load()
    streams = [torch.cuda.Stream(), torch.cuda.Stream(priority=-1), torch.cuda.Stream()]
    queues = Queues(tuple(s.cuda_stream for s in streams), tuple(driver.event() for _ in range(3)))
    for name, steps in kinds(source.data_ptr(), target.data_ptr()).items():
        print(f"{name:24} {measure(driver, queues, steps):6.2f} us a call", flush=True)
    print(f"{'torch.mm':24} {matmul_us():6.2f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())

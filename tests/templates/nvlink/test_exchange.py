"""The kernel of exchanges, as it stands, on the host: all ranks, call after call, under many orders of events (host_world.h).

There is no model of the protocol in plain Python beside it, as there is of pushes: what runs here is the kernel itself, under a random
scheduler that sees every thread, with stores that are late.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator

import pytest
import tilelang
import tvm

from tests.exchange_cases import ulysses
from tscompile.templates.nvlink import exchange, legs
from tscompile.templates.nvlink.kernels.config import SMS
from tscompile.templates.nvlink.kernels.exchange import exchange_kernel
from tscompile.templates.nvlink.kernels.gemm import PASS_CONFIGS
from tscompile.templates.nvlink.launch import Kernel

from . import host_code
from .fake_gpu import spec_of
from .host_exchange import CELL, SITE, Run, random_cases

NAN = -1  # bfloat16's, of all bits

# Each makes the kernel wrong, in a way that is seen: what stands in exchange.h, and what instead.
FENCE, FLAG = "      tsl_fence_sys();", "      tsl_st_relaxed_sys(x.flag(rank, owner, number, batch.number), now);"
MUTATIONS = {
    "the next claims take the place of the last ones of the pushes": (r"  tsx_sync\(\);   // all have read.*\n", ""),
    "no fence": (rf"{re.escape(FENCE)}.*\n", ""),
    "the flag first": (rf"{re.escape(FENCE)}.*\n{re.escape(FLAG)}", f"{FLAG}\n{FENCE}"),
    "a fence before the others have stored": (
        rf"(    tsx_sync\(\);\n    if \(threadIdx.x % TSX_GROUP == 0\)) \{{\n{re.escape(FENCE)}.*\n",
        rf"    if (threadIdx.x % TSX_GROUP == 0) {FENCE.strip()}\n\1 {{\n",
    ),
    "no wait": (r"if \(threadIdx.x % TSX_GROUP == 0\) tsl_wait_epoch\(.*\n", "\n"),
    "one thread alone has waited": (r"(tsl_wait_epoch\(.*\n)      tsx_sync\(\);\n", r"\1"),
    "a claim is read before it is there": (r"(TSX_PUSHES,.*\n  claims.claim\(\);\n)  tsx_sync\(\);\n", r"\1"),
    "the next claim takes the place of this one": (r"\(turn & 1\)", "0"),
}


def kernel_source() -> str:
    """The kernel as TileLang writes it, calls of exchange.h and tile.h."""
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_90a"})
    with tvm.transform.PassContext(opt_level=3, config=PASS_CONFIGS), target:
        source = tilelang.lower(exchange_kernel(SMS), target=target).kernel_source
    return source[source.rindex('extern "C" __global__ void __launch_bounds__(512, 1) ') :].partition(") ")[2]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    text, kernel = host_code.kernel_text("exchange.h"), kernel_source()
    texts = [text]
    for old, new in MUTATIONS.values():
        changed, count = re.subn(old, new, text)
        assert count == 1, old
        texts.append(changed)
    places = ", ".join(f"p[{place}]" for place in range(len(spec_of("exchange", SMS).parameters)))
    call = f"static void run(const int64_t *p) {{ exchange_kernel({places}); }}"
    spaces = [f"namespace v{i} {{\n{text}\nstatic void {kernel}\n{call}\n}}" for i, text in enumerate(texts)]
    versions = f"void (*const versions[])(const int64_t *) = {{{', '.join(f'v{i}::run' for i in range(len(texts)))}}};"
    runner = (host_code.HERE / "host_exchange.h").read_text()
    return host_code.build(tmp_path_factory.mktemp("exchange"), *spaces, versions, runner=runner)


@pytest.fixture(autouse=True)
def on_host() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "kernel", lambda name, *args: Kernel(spec_of(name, *args), 1))
        yield


RANKS = pytest.mark.parametrize("ranks", [2, 3, 4])


@RANKS
@pytest.mark.parametrize("copied", [False, True], ids=["pushed", "copied"])
def test_random_exchanges(library: ctypes.CDLL, ranks: int, copied: bool) -> None:
    """With more batches than CTAs, and fewer."""
    for seed, case in enumerate(random_cases(ranks, 8)):
        Run(case, ranks, seed, ctas=1 + seed % 3, copied=copied, calls=3 if seed < 4 else 1).run(library).check()


@RANKS
def test_exchanges_of_attention(library: ctypes.CDLL, ranks: int) -> None:
    for seed, case in enumerate([*ulysses(ranks, 1, 33, 2, 16), *ulysses(ranks, 2, 3, 1, 8)]):
        Run(case, ranks, seed, calls=1, copied=seed == 1).run(library).check()


@RANKS
def test_any_resident_ctas_do_it(library: ctypes.CDLL, ranks: int) -> None:
    """A CTA that waits for peers holds up no push of its own: one after the other they come through, on all ranks."""
    for seed, case in enumerate(random_cases(ranks, 4, least=600)):
        run = Run(case, ranks, seed, ctas=3, resident=1)
        assert (ranks - 1) * run.batches.count > 1
        run.run(library).check()


@RANKS
@pytest.mark.parametrize("copied", [False, True], ids=["pushed", "copied"])
def test_ranks_that_begin_late(library: ctypes.CDLL, ranks: int, copied: bool) -> None:
    """By less than a call, and when the others can do nothing without them: two slots suffice."""
    for seed, case in enumerate(random_cases(ranks, 3)):
        late = [0, 2000 + 9000 * seed, 1 << 40, 100][:ranks]
        Run(case, ranks, seed, calls=5, late=late[seed % ranks :] + late[: seed % ranks], copied=copied).run(
            library
        ).check()


def test_one_slot_does_not_suffice(library: ctypes.CDLL) -> None:
    with pytest.raises(
        AssertionError, match="call"
    ):  # a fast rank's next call is in the place of what a slow one has yet to read
        for seed, case in enumerate(random_cases(3, 6)):
            Run(case, 3, seed, calls=5, slot_count=1).run(library).check()


@pytest.mark.parametrize("ranks", [2, 3])
def test_batches_of_several_steps(library: ctypes.CDLL, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as those of large exchanges."""
    monkeypatch.setattr(legs, "_MOST_BATCHES", 1)
    for seed, case in enumerate(random_cases(ranks, 2, least=2500, most=9000)):
        run = Run(case, ranks, seed, calls=1)
        assert run.batches.words == 4096
        run.run(library).check()


@pytest.mark.parametrize("copied", [False, True], ids=["pushed", "copied"])
def test_a_rank_that_stays_away(library: ctypes.CDLL, copied: bool) -> None:
    """The others say whom they waited for, and no output has a word that looks like data: all are NaN."""
    for seed, case in enumerate(random_cases(3, 3)):
        run = Run(case, 3, seed, calls=1, late=[0, -1, 0], copied=copied)
        with pytest.raises(host_code.Hung, match="waited in vain"):
            run.run(library)
        # The one that gave up says so, and the other one that it has heard of it.
        gave_up = {rank: record for rank, record in enumerate(run.group.records.tolist()) if record[2] == SITE}
        assert gave_up and gave_up.keys() <= {0, 2} and run.group.aborted.all()
        for rank, (who, peer, _, expected, seen, *_) in gave_up.items():
            assert (who, peer, expected, seen) == (rank + 1, 1, CELL + 1, CELL)
        assert run.group.records[:, 0].tolist() == [1, 0, 3]
        for rank in (0, 2):
            assert all((output == NAN).all() for output in run.outputs[0][rank]), case.name
            assert not run.counters[rank].any()


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_what_the_tests_above_would_see(library: ctypes.CDLL, mutation: str) -> None:
    version = 1 + list(MUTATIONS).index(mutation)
    for seed, case in enumerate(random_cases(3, 6, least=600)):
        run = Run(case, 3, seed, calls=2, version=version)
        try:
            run.run(library).check()
        except AssertionError:
            return
    pytest.fail("no run goes wrong")

"""Cannon's matmul on a square mesh of ranks: blocks of A move left, blocks of B move up, by one rank in each step.

First every row i of A moves left by i and every column j of B up by j, so that each rank starts with blocks that belong together.
"""

from common import Example, World
from mesh import Route, allowed, check, kernels


def routes(side: int, i: int, j: int, step: int) -> tuple[Route, Route]:
    """From the right and to the left, from below and upwards."""
    right, down = (i, j) if step == 0 else (1, 1)
    a = Route(source=i * side + (j + right) % side, to=only(i * side + (j - right) % side), forward=step > 0)
    b = Route(source=(i + down) % side * side + j, to=only((i - down) % side * side + j), forward=step > 0)
    return a, b


def only(rank: int) -> range:
    return range(rank, rank + 1)


def run(world: World) -> str:
    return check(world, routes)


EXAMPLE = Example(run, kernels, dict.fromkeys(("m", "n", "k"), (128, 16384)), ranks=4, allowed=allowed)

if __name__ == "__main__":
    EXAMPLE.main()

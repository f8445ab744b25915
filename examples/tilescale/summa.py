"""SUMMA on a square mesh of ranks: in step s, column s of A is sent along the rows, and row s of B along the columns."""

from common import Example, World
from mesh import Route, allowed, check, kernels


def routes(side: int, i: int, j: int, step: int) -> tuple[Route, Route]:
    """A[i, step] to the ranks of row i, B[step, j] to those of column j, by those who have them."""
    row, column = range(i * side, (i + 1) * side), range(j, side * side, side)
    nobody = range(0)
    return Route(row[step], row if j == step else nobody), Route(column[step], column if i == step else nobody)


def run(world: World) -> str:
    return check(world, routes)


EXAMPLE = Example(run, kernels, dict.fromkeys(("m", "n", "k"), (128, 16384)), ranks=4, allowed=allowed)

if __name__ == "__main__":
    EXAMPLE.main()

"""A flat index cut into factors: the common grid of several strided views of one tensor.

Views that read one tensor in different orders, or different parts of it, agree on a grid if all their digits begin and end at cut
points that divide one another: `total = f0 * f1 * ... * fk`, outermost factor first. Every view is then a choice of factors in some
order, with the other factors fixed at one index.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .layout import Digit, Digits, View
from .sizes import Size, divides, known_eq, known_le, plain, product, quotient


@dataclass(frozen=True)
class Placement:
    """A view as factors of a grid.

    dims: of the view; each is a list of factor numbers, outermost first; a digit of stride 0 stands as itself.
    fixed: (factor, index) of every factor that the view does not walk over.
    """

    dims: tuple[tuple[int | Digit, ...], ...]
    fixed: tuple[tuple[int, int], ...]

    @property
    def factors(self) -> tuple[int, ...]:
        return tuple(f for dim in self.dims for f in dim if isinstance(f, int))

    @property
    def repeats(self) -> bool:
        return any(isinstance(f, Digit) for dim in self.dims for f in dim)


class Cuts:
    """Cut points of `[0, total)`: from 1 to total, each dividing the next."""

    def __init__(self, points: Iterable[Size]) -> None:
        self._points: list[Size] = []
        for point in points:
            if not self._points or not known_eq(point, self._points[-1]):
                self._points.append(point)

    @staticmethod
    def of_shape(shape: Iterable[Size]) -> Cuts:
        """The dims of a row-major tensor."""
        points: list[Size] = [1]
        for size in reversed(list(shape)):
            points.append(product([points[-1], size]))
        return Cuts(points)

    @property
    def sizes(self) -> list[Size]:
        """Sizes of the factors, outermost first."""
        points = self._points
        return [quotient(points[i], points[i - 1]) for i in range(len(points) - 1, 0, -1)]

    def stride(self, factor: int) -> Size:
        return self._points[len(self._points) - 2 - factor]

    def insert(self, points: Iterable[Size], below: Size | None = None) -> bool:
        """Cut at all of `points`, or at none if one of them does not fit; nothing is cut between `below` and the total."""
        old = list(self._points)
        for point in points:
            if not self._insert(point, below):
                self._points = old
                return False
        return True

    def _insert(self, point: Size, below: Size | None) -> bool:
        if any(known_eq(point, have) for have in self._points):
            return True
        for i in range(1, len(self._points)):
            inner, outer = self._points[i - 1], self._points[i]
            if below is not None and known_eq(inner, below):
                return False
            if divides(inner, point) and divides(point, outer):
                self._points.insert(i, point)
                return True
        return False

    def cut_for(self, view: View, below: Size | None = None) -> bool:
        """Make the grid fine enough for `view`; False, and nothing changed, if that cannot be."""
        digits = [d for d in view.digits if not known_eq(d.stride, 0)]
        old = list(self._points)
        points = [p for d in digits for p in (d.stride, product([d.stride, d.size]))]
        if self.insert(points, below) and self.place(view) is not None:
            return True
        self._points = old
        return False

    def place(self, view: View) -> Placement | None:
        """`view` in factors of this grid, None if it is none: it reads an element twice, or backwards, or cuts a factor."""
        dims: list[tuple[int | Digit, ...]] = []
        taken: set[int] = set()
        for dim in view.dims:
            factors: list[int | Digit] = []
            for digit in dim:
                run = [digit] if known_eq(digit.stride, 0) else self._run(digit)
                if run is None or any(f in taken for f in run):
                    return None
                taken.update(f for f in run if isinstance(f, int))
                factors += run
            dims.append(tuple(factors))
        fixed = self._fixed(view.offset, taken)
        return None if fixed is None else Placement(tuple(dims), fixed)

    def _run(self, digit: Digit) -> list[int | Digit] | None:
        top = product([digit.size, digit.stride])
        first = next((i for i, p in enumerate(self._points) if known_eq(p, digit.stride)), None)
        last = next((i for i, p in enumerate(self._points) if known_eq(p, top)), None)
        if first is None or last is None or last <= first:
            return None
        count = len(self._points) - 1
        return [count - 1 - i for i in range(last - 1, first - 1, -1)]

    def _fixed(self, offset: Size, taken: set[int]) -> tuple[tuple[int, int], ...] | None:
        """Indices of the factors that are not taken, which make up the offset; None if they do not."""
        found: list[tuple[int, int]] = []
        left = offset
        for factor in range(len(self._points) - 1):
            stride = self.stride(factor)
            index: Size = 0 if known_le(left + 1, stride) else plain(left // stride)
            if not isinstance(index, int) or index < 0 or (index and factor in taken):
                return None
            left = plain(left - index * stride)
            if factor not in taken:
                found.append((factor, index))
        return tuple(found) if known_eq(left, 0) else None


def flat(dims: Iterable[Digits]) -> Digits:
    return tuple(digit for dim in dims for digit in dim)

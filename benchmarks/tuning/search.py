"""Which block sizes to try, one after the other."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from jaxrec_kernels.tuning.table import Sizes

# What has to be gained for an entry to be worth its line: a cost of at most this times the rule's.
WORTH = 0.98


class Figure(NamedTuple):
    """What blocks cost, in cycles or seconds, and registers spilled; a timing knows of none."""

    cost: float
    spills: int


class Found(NamedTuple):
    """The best blocks that were seen, those of the rule, and how many were tried."""

    rule: dict[str, int]
    of_rule: Figure
    blocks: dict[str, int]
    figure: Figure
    tried: int

    @property
    def gain(self) -> float:
        """The share of the rule's cost that is saved."""
        return 1 - self.figure.cost / self.of_rule.cost

    @property
    def keeps(self) -> bool:
        """Whether the blocks are worth an entry."""
        return (
            self.figure.cost <= WORTH * self.of_rule.cost
            and self.figure.spills <= self.of_rule.spills
        )


class Climb:
    """Goes from the rule's blocks to better neighbours until there is none.

    Give `asks` to the one who measures, and the answer to `tell`; done when `asks` is None. Blocks
    that fail, or spill more than the rule's, are passed over.

    Args:
      kernel: its name.
      rule: where to begin.
      fits: whether a call can be cut so.
      most: how many are measured at most.
    """

    def __init__(
        self, kernel: str, rule: dict[str, int], fits: Callable[[Sizes], bool], most: int
    ) -> None:
        self.kernel, self.rule = kernel, rule
        self._fits, self._most = fits, most
        self._seen: dict[tuple[int, ...], Figure | None] = {}
        self._best, self._steps = rule, self._run()
        self.asks: dict[str, int] | None = next(self._steps)

    def tell(self, figure: Figure | None) -> None:
        """What the blocks in `asks` cost; None where they failed."""
        assert self.asks is not None
        self._seen[tuple(self.asks.values())] = figure
        self.asks = next(self._steps, None) if len(self._seen) < self._most else None

    def found(self) -> Found | None:
        """None where the rule's own blocks failed."""
        of_rule = self._figure(self.rule)
        if of_rule is None:
            return None
        names = tuple(self.rule)
        good = [
            (figure.cost, number, dict(zip(names, sizes, strict=True)), figure)
            for number, (sizes, figure) in enumerate(self._seen.items())
            if figure is not None and figure.spills <= of_rule.spills
        ]
        _, _, blocks, figure = min(good, key=lambda x: x[:2])
        return Found(self.rule, of_rule, blocks, figure, len(self._seen))

    def _figure(self, blocks: Sizes) -> Figure | None:
        return self._seen.get(tuple(blocks.values()))

    def _run(self) -> Iterator[dict[str, int]]:
        yield self.rule
        best = None
        while (found := self.found()) is not None and found.blocks != best:
            best = found.blocks
            for blocks in neighbours(self.kernel, best):
                if tuple(blocks.values()) not in self._seen and self._fits(blocks):
                    yield blocks


def neighbours(kernel: str, blocks: Sizes) -> Iterator[dict[str, int]]:
    """Blocks that differ in one size, the rest following where it must."""
    for prefix, moves in _MOVES.items():
        if kernel.startswith(prefix):
            yield from (moved for moved in moves(dict(blocks)) if min(moved.values()) > 0)


def program_size(blocks: Sizes) -> int:
    """How much a program does, to compare with another one of the same kernel."""
    return math.prod(size for name, size in blocks.items() if name not in _WITHIN)


def _catalogue(blocks: dict[str, int]) -> Iterator[dict[str, int]]:
    positions, items, chunk = blocks["positions"], blocks["items"], blocks["chunk"]
    for other in (items + chunk, items - chunk, 2 * items, items // 2 // chunk * chunk):
        yield blocks | {"items": other}
    for other in (2 * chunk, chunk + 128, chunk - 128, chunk // 2 // 128 * 128):
        if other > 0:
            for rounds in sorted({-(-items // other), items // other}, reverse=True):
                yield blocks | {"items": rounds * other, "chunk": other}
    for other in (2 * positions, positions // 2, positions + 128, positions - 128):
        yield blocks | {"positions": other}
        if other > positions:
            yield blocks | {"positions": other, "items": items // 2 // chunk * chunk}


def _hstu(blocks: dict[str, int]) -> Iterator[dict[str, int]]:
    block, sequences, group = blocks["block"], blocks["sequences"], blocks["group"]
    for other in (2 * sequences, sequences // 2):
        yield blocks | {"sequences": other, "together": min(blocks["together"], max(other, 1))}
    for other in (1, 2, 4):
        yield blocks | {"together": other}
    for other in (group // 2, 2 * group):
        yield blocks | {"group": other}
    for other in (2 * block, block // 2, block + 128, block - 128):
        yield blocks | {"block": other, "sequences": 1, "together": 1}


def _whole_rows(blocks: dict[str, int]) -> Iterator[dict[str, int]]:
    rows = blocks["rows"]
    for other in (2 * rows, rows // 2):
        yield blocks | {"rows": other}
    for other in (1, 2, 4):
        yield blocks | {"packed": other, "rows": max(rows, other)}


def _long_rows(blocks: dict[str, int]) -> Iterator[dict[str, int]]:
    block = blocks["block"]
    for other in (2 * block, block // 2, block + 128, block - 128):
        yield {"block": other}


# How a program goes about it; the others say how much it does.
_WITHIN = ("chunk", "together", "packed")
_MOVES: dict[str, Callable[[dict[str, int]], Iterator[dict[str, int]]]] = {
    "linear_cross_entropy": _catalogue,
    "hstu_attention": _hstu,
    "positional_kernel_attention": _whole_rows,
    "long_attention": _long_rows,
}

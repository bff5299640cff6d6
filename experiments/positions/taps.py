"""The learned kernel over positions of a run, by lag: read from its parameters, and drawn."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxrec.errors import UserError
from jaxrec.models.config import PositionalKernelConfig

_NAME = re.compile(r"blocks\.(\d+)\.kernel\.(logits|values)")
_SIGNS = {"logits": "u", "values": "l"}


class Taps(NamedTuple):
    """One factor of one block and head.

    Attributes:
      block, head: from 0.
      factor: "logits" or "values".
      mean: float[n], the tap at each lag; of a full factor, the mean of that diagonal.
      low, high: the same, or a tenth and nine tenths of the diagonal's entries.
    """

    block: int
    head: int
    factor: str
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @property
    def half_lag(self) -> int | None:
        """Half of the squares behind lag 0 lie within this lag; None if all are 0."""
        size = (self.mean[1:] ** 2).cumsum()
        if not len(size) or size[-1] == 0:
            return None
        return 1 + int(np.searchsorted(size, size[-1] / 2))

    def __str__(self) -> str:
        half = "" if self.half_lag is None else f", half of the rest within lag {self.half_lag}"
        return (
            f"block {self.block + 1}, head {self.head + 1}, {_SIGNS[self.factor]} on the "
            f"{self.factor}: {self.mean[0]:+.3f} at lag 0{half}"
        )


def read_taps(parameters: Mapping[str, Any], config: PositionalKernelConfig) -> list[Taps]:
    """The factors by block and head.

    Args:
      parameters: by dotted name, as `Run.parameters` has them.
      config: of the model's kernel.

    Raises:
      UserError: there is no kernel among the parameters.
    """
    found = []
    for name in sorted(parameters):
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        block, factor = int(match[1]), match[2]
        array = np.asarray(parameters[name], np.float64)
        structure = config.logits if factor == "logits" else config.values
        for head, one in enumerate(array if config.per_head else array[None]):
            if structure == "full":
                # Both as lower triangles: the lag is how far below the diagonal.
                lower = one.T if factor == "logits" else one
                mean, low, high = _diagonals(lower)
            else:
                mean = low = high = one
            found.append(Taps(block, head, factor, mean, low, high))
    if not found:
        raise UserError("this run has no positional kernel (--model.position kernel)")
    return found


def _diagonals(lower: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    diagonals = [np.diagonal(lower, -lag) for lag in range(len(lower))]
    low, high = (np.array([np.quantile(d, q) for d in diagonals]) for q in (0.1, 0.9))
    return np.array([d.mean() for d in diagonals]), low, high


def draw_taps(found: list[Taps], path: Path, title: str) -> None:
    """A panel a block and head, taps against lag; of full factors the middle of each diagonal."""
    from matplotlib.figure import Figure

    blocks = sorted({taps.block for taps in found})
    heads = sorted({taps.head for taps in found})
    figure = Figure(figsize=(6.5 * len(heads), 2.8 * len(blocks) + 0.5), layout="constrained")
    panels = figure.subplots(len(blocks), len(heads), squeeze=False, sharex=True)
    for taps in found:
        axes = panels[blocks.index(taps.block)][heads.index(taps.head)]
        lags = np.arange(len(taps.mean))
        half = "" if taps.half_lag is None else f", half of the rest within lag {taps.half_lag}"
        label = f"{_SIGNS[taps.factor]} ({taps.factor}): {taps.mean[0]:+.2f} at lag 0{half}"
        color = "C0" if taps.factor == "logits" else "C1"
        axes.plot(lags, taps.mean, ".-", markersize=4, linewidth=1, color=color, label=label)
        if not np.array_equal(taps.low, taps.high):
            axes.fill_between(lags, taps.low, taps.high, color=color, alpha=0.2, linewidth=0)
        axes.axhline(0, color="0.7", linewidth=0.8)
        axes.set_xscale("symlog", linthresh=1)
        axes.set_title(f"block {taps.block + 1}, head {taps.head + 1}", fontsize=9)
        axes.set_ylabel("tap")
        axes.legend(fontsize=8)
    for axes in panels[-1]:
        axes.set_xlabel("lag: events between (0 is the event itself)")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)

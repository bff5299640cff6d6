"""The roofline plot: what was reached, under what the device can do."""

from pathlib import Path
from typing import Any

from jaxrec.errors import UserError

_MARKERS = {"xla": "o", "pallas": "s", "naive": "^"}


def check_plot(path: Path) -> None:
    """Raises UserError where a plot could not be written in the end."""
    if path.suffix != ".png":
        raise UserError(f"{path}: a plot is written to a .png file")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: there is no such folder to write the plot to")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("a plot needs matplotlib: pip install 'jaxrec[plot]'") from None


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A point for each row that was measured: FLOP/s over FLOPs a byte, both counted by hand."""
    from matplotlib.figure import Figure

    measured = [row for row in rows if "skipped" not in row]
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.add_subplot()
    intensities = [row["flops"] / row["bytes"] for row in measured] or [1.0]
    for dtype, roofs in _roofs(measured).items():
        ridge = roofs["flops_per_second"] / roofs["bytes_per_second"]
        x = [min(*intensities, ridge) / 2, ridge, max(*intensities, ridge) * 2]
        y = [min(roofs["flops_per_second"], i * roofs["bytes_per_second"]) for i in x]
        axes.plot(x, y, color="0.4", linewidth=1, linestyle="-" if dtype == "float32" else "--")
        axes.annotate(
            f"{dtype}: {y[1] / 1e9:,.0f} GFLOP/s, {roofs['bytes_per_second'] / 1e9:,.0f} GB/s",
            (x[1], y[1]),
            xytext=(2, 4),
            textcoords="offset points",
            fontsize=8,
            color="0.3",
        )
    ops = list(dict.fromkeys(row["op"] for row in measured))
    for row in measured:
        x, y = row["flops"] / row["bytes"], row["flops_per_second"]
        filled = row["direction"] == "gradient"
        color = f"C{ops.index(row['op'])}"
        axes.scatter(
            x,
            y,
            marker=_MARKERS[row["implementation"]],
            facecolors=color if filled else "none",
            edgecolors=color,
            s=28,
        )
        axes.annotate(row["shape"], (x, y), xytext=(4, -3), textcoords="offset points", fontsize=6)
    for number, op in enumerate(ops):
        axes.scatter([], [], color=f"C{number}", marker="o", label=op)
    for name in dict.fromkeys(row["implementation"] for row in measured):
        axes.scatter([], [], color="0.3", marker=_MARKERS[name], label=name)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="FLOP/s")
    device = measured[0]["device"] if measured else "nothing measured"
    axes.set_title(f"{device}; filled: gradient, open: forward", fontsize=10)
    if measured:
        axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)


def _roofs(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    return {row["dtype"]: row["ceilings"] for row in rows}

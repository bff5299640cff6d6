"""Draws the learned positional kernel of a run: taps against lag, a panel a block and head.

python -m experiments.plot_taps runs/positions/amazon-2014-beauty/kernel-seed0 --out taps.png
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.timings.roofline import check_plot
from experiments.positions.taps import draw_taps, read_taps
from jaxrec.errors import UserError
from jaxrec.models.config import TransformerConfig
from jaxrec.serving.run import Run


@dataclass(frozen=True)
class Arguments:
    """Draw the learned taps of a run."""

    run: tyro.conf.Positional[Path]
    """A run folder."""
    out: Path
    """The PNG file."""


def main(arguments: Arguments) -> int:
    try:
        check_plot(arguments.out)
        run = Run(arguments.run)
        model = run.config.model
        if not isinstance(model, TransformerConfig) or "kernel" not in model.position:
            raise UserError(f"{arguments.run}: this run has no positional kernel")
        taps = read_taps(run.parameters, model.kernel)
        data = run.folder.read_data()["name"]
        title = f"{run.config.name} on {data}, seed {run.config.training.seed}"
        draw_taps(taps, arguments.out, title)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*taps, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))

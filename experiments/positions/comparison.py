"""What the runs of a study say together: means over seeds, and differences of pairs."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from experiments.positions.arms import FACTORS, Arm
from experiments.positions.cells import BY_USER, METRICS, Cell, Values
from jaxrec.errors import UserError
from jaxrec.evaluation.bootstrap import confidence_interval, paired_difference


class Outcome(NamedTuple):
    """What is known of a cell: its results, and its values by user where the run is at hand."""

    cell: Cell
    results: Mapping[str, Any]
    values: Values | None


def summarize(outcomes: Sequence[Outcome], *, level: float, resamples: int) -> dict[str, Any]:
    """The study of one data set, ready for JSON.

    An arm and its reference are compared on the seeds that both were run with: with one seed they
    see the same batches in the same order, and what makes a user easy for both cancels. The
    interval draws users, each with its lists of all seeds; what another seed would have done is
    told by the differences of the single seeds.
    """
    first = outcomes[0].cell
    options = {"level": level, "resamples": resamples}
    by_arm: dict[str, dict[int, Outcome]] = {}
    for outcome in outcomes:
        by_arm.setdefault(outcome.cell.arm.name, {})[outcome.cell.seed] = outcome
    arms = []
    for of_arm in by_arm.values():
        arm = next(iter(of_arm.values())).cell.arm
        reference = by_arm.get(arm.reference or "", {})
        arms.append(_arm(arm, of_arm, options) | {"paired": _paired(of_arm, reference, options)})
    return {
        "study": "positions",
        "dataset": first.dataset,
        "data_hash": first.data_hash,
        "metrics": list(METRICS),
        **options,
        "arms": arms,
    }


def _arm(arm: Arm, of_arm: Mapping[int, Outcome], options: dict[str, Any]) -> dict[str, Any]:
    known = [o.values for o in of_arm.values() if o.values is not None]
    return {
        "arm": arm.name,
        "says": arm.says,
        "part": "factors" if arm in FACTORS else "schemes",
        "reference": arm.reference,
        "experiment": next(iter(of_arm.values())).cell.config.name,
        "changes": {"model": dict(arm.model), "kernel": dict(arm.kernel)},
        "seeds": [_seed(seed, of_arm[seed]) for seed in sorted(of_arm)],
        "means": {
            metric: fmean(o.results["metrics"]["test"][metric] for o in of_arm.values())
            for metric in METRICS
        },
        # Of all seeds, or of none: an interval is that of the mean beside it.
        "intervals": {
            metric: list(
                confidence_interval(_of(known, metric), groups=_users(known), **options)[1:]
            )
            for metric in BY_USER
            if len(known) == len(of_arm)
        },
    }


def _seed(seed: int, outcome: Outcome) -> dict[str, Any]:
    results = outcome.results
    return {
        "seed": seed,
        **{metric: results["metrics"]["test"][metric] for metric in METRICS},
        **{name: results[name] for name in ("epochs", "step", "seconds", "device")},
        "jax": results["versions"]["jax"],
        "at_hand": outcome.values is not None,
    }


def _paired(
    of_arm: Mapping[int, Outcome], of_reference: Mapping[int, Outcome], options: dict[str, Any]
) -> dict[str, Any] | None:
    """Arm minus reference; None where no seed has the values of both."""
    seeds = [
        seed
        for seed in sorted(set(of_arm) & set(of_reference))
        if of_arm[seed].values is not None and of_reference[seed].values is not None
    ]
    if not seeds:
        return None
    ours = [v for s in seeds if (v := of_arm[s].values) is not None]
    theirs = [v for s in seeds if (v := of_reference[s].values) is not None]
    for seed, one, other in zip(seeds, ours, theirs, strict=True):
        if not np.array_equal(one.users, other.users):
            raise UserError(
                f"{of_arm[seed].cell} and {of_reference[seed].cell} were judged on other users"
            )
    found: dict[str, Any] = {"seeds": seeds}
    for metric in METRICS:
        found[metric] = {
            "by_seed": [
                of_arm[s].results["metrics"]["test"][metric]
                - of_reference[s].results["metrics"]["test"][metric]
                for s in seeds
            ]
        }
        found[metric]["mean"] = fmean(found[metric]["by_seed"])
    for metric in BY_USER:
        difference = paired_difference(
            _of(ours, metric), _of(theirs, metric), groups=_users(ours), **options
        )
        found[metric] |= difference._asdict()
    return found


def _of(values: Sequence[Values], metric: str) -> np.ndarray:
    return np.concatenate([v.by_metric[metric] for v in values])


def _users(values: Sequence[Values]) -> np.ndarray:
    return np.concatenate([v.users for v in values])

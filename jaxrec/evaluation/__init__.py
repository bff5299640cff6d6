"""Evaluation: metrics, intervals, baselines, ranked-lists files, reports.

The names below load what they need when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxrec.evaluation.baselines import evaluate_baselines as evaluate_baselines
    from jaxrec.evaluation.baselines import most_recent as most_recent
    from jaxrec.evaluation.baselines import popularity as popularity
    from jaxrec.evaluation.baselines import popularity_scores as popularity_scores
    from jaxrec.evaluation.baselines import recency_scores as recency_scores
    from jaxrec.evaluation.bootstrap import confidence_interval as confidence_interval
    from jaxrec.evaluation.bootstrap import confidence_intervals as confidence_intervals
    from jaxrec.evaluation.bootstrap import paired_difference as paired_difference
    from jaxrec.evaluation.ctr_metrics import auc as auc
    from jaxrec.evaluation.ctr_metrics import gauc as gauc
    from jaxrec.evaluation.ctr_metrics import log_loss as log_loss
    from jaxrec.evaluation.item_neighbours import item_knn as item_knn
    from jaxrec.evaluation.item_neighbours import item_similarities as item_similarities
    from jaxrec.evaluation.metrics import RelevantSets as RelevantSets
    from jaxrec.evaluation.metrics import coverage as coverage
    from jaxrec.evaluation.metrics import per_list as per_list
    from jaxrec.evaluation.metrics import ranking_metrics as ranking_metrics
    from jaxrec.evaluation.ranked_lists import evaluate_ranked as evaluate_ranked
    from jaxrec.evaluation.ranked_lists import read_ranked as read_ranked
    from jaxrec.evaluation.ranked_writer import RankedWriter as RankedWriter
    from jaxrec.evaluation.ranked_writer import write_ranked as write_ranked
    from jaxrec.evaluation.report import Report as Report
    from jaxrec.evaluation.report import as_json as as_json
    from jaxrec.evaluation.report import as_table as as_table
    from jaxrec.evaluation.report import compare as compare
    from jaxrec.evaluation.report import json_line as json_line
    from jaxrec.evaluation.report import print_report as print_report
    from jaxrec.evaluation.results import Evaluation as Evaluation
    from jaxrec.evaluation.results import describe_protocol as describe_protocol
    from jaxrec.evaluation.results import evaluate_lists as evaluate_lists

# name -> module that defines it
_LAZY: dict[str, str] = {
    "Evaluation": "jaxrec.evaluation.results",
    "RankedWriter": "jaxrec.evaluation.ranked_writer",
    "RelevantSets": "jaxrec.evaluation.metrics",
    "Report": "jaxrec.evaluation.report",
    "as_json": "jaxrec.evaluation.report",
    "as_table": "jaxrec.evaluation.report",
    "auc": "jaxrec.evaluation.ctr_metrics",
    "compare": "jaxrec.evaluation.report",
    "confidence_interval": "jaxrec.evaluation.bootstrap",
    "confidence_intervals": "jaxrec.evaluation.bootstrap",
    "coverage": "jaxrec.evaluation.metrics",
    "describe_protocol": "jaxrec.evaluation.results",
    "evaluate_baselines": "jaxrec.evaluation.baselines",
    "evaluate_lists": "jaxrec.evaluation.results",
    "evaluate_ranked": "jaxrec.evaluation.ranked_lists",
    "gauc": "jaxrec.evaluation.ctr_metrics",
    "item_knn": "jaxrec.evaluation.item_neighbours",
    "item_similarities": "jaxrec.evaluation.item_neighbours",
    "json_line": "jaxrec.evaluation.report",
    "log_loss": "jaxrec.evaluation.ctr_metrics",
    "most_recent": "jaxrec.evaluation.baselines",
    "paired_difference": "jaxrec.evaluation.bootstrap",
    "per_list": "jaxrec.evaluation.metrics",
    "popularity": "jaxrec.evaluation.baselines",
    "popularity_scores": "jaxrec.evaluation.baselines",
    "print_report": "jaxrec.evaluation.report",
    "ranking_metrics": "jaxrec.evaluation.metrics",
    "read_ranked": "jaxrec.evaluation.ranked_lists",
    "recency_scores": "jaxrec.evaluation.baselines",
    "write_ranked": "jaxrec.evaluation.ranked_writer",
}

__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'jaxrec.evaluation' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

"""Data sets: import, prepared form, splits, pipelines.

The names below load what they need when they are first used, so that `import jaxrec.data` stays
light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxrec.data.filters import k_core as k_core
    from jaxrec.data.filters import refine as refine
    from jaxrec.data.paths import data_dir as data_dir
    from jaxrec.data.paths import dataset_dir as dataset_dir
    from jaxrec.data.prepared import Interactions as Interactions
    from jaxrec.data.prepared import open_prepared as open_prepared
    from jaxrec.data.prepared import write_prepared as write_prepared
    from jaxrec.data.splits import Spans as Spans
    from jaxrec.data.splits import Split as Split
    from jaxrec.data.splits import Targets as Targets
    from jaxrec.data.splits import leave_one_out as leave_one_out
    from jaxrec.data.splits import make_split as make_split
    from jaxrec.data.splits import resolve_split as resolve_split
    from jaxrec.data.splits import temporal as temporal
    from jaxrec.data.statistics import describe as describe
    from jaxrec.data.statistics import list_prepared as list_prepared
    from jaxrec.data.tabular import import_table as import_table

# name -> module that defines it
_LAZY: dict[str, str] = {
    "Interactions": "jaxrec.data.prepared",
    "Spans": "jaxrec.data.splits",
    "Split": "jaxrec.data.splits",
    "Targets": "jaxrec.data.splits",
    "data_dir": "jaxrec.data.paths",
    "dataset_dir": "jaxrec.data.paths",
    "describe": "jaxrec.data.statistics",
    "import_table": "jaxrec.data.tabular",
    "k_core": "jaxrec.data.filters",
    "leave_one_out": "jaxrec.data.splits",
    "list_prepared": "jaxrec.data.statistics",
    "make_split": "jaxrec.data.splits",
    "open_prepared": "jaxrec.data.prepared",
    "refine": "jaxrec.data.filters",
    "resolve_split": "jaxrec.data.splits",
    "temporal": "jaxrec.data.splits",
    "write_prepared": "jaxrec.data.prepared",
}

__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'jaxrec.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

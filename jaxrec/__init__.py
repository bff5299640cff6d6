"""jaxrec: recommender ops, models and kernels for accelerators, in JAX.

`import jaxrec` and `import jaxrec.ops` load JAX and nothing heavier; the names below load what
they need when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jaxrec._fit import fit as fit
    from jaxrec.errors import UserError as UserError
    from jaxrec.serving.run import Run as Run
    from jaxrec.serving.run import load as load

# name -> module that defines it
_LAZY: dict[str, str] = {
    "UserError": "jaxrec.errors",
    "Run": "jaxrec.serving.run",
    "fit": "jaxrec._fit",
    "load": "jaxrec.serving.run",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'jaxrec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

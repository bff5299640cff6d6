"""Arrays for a case: what each argument holds, by its name."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import Case, argument_names, program
from jaxrec_kernels.shapes import CatalogueShape

_Shape = tuple[int, ...]
# Seconds from 0 to the last event of a row; differences fit int32.
_LONGEST_ROW = 2**31 - 1


def arrays(case: Case, dtype: Any, seed: int = 0) -> list[jax.Array]:
    """The arguments of the case's function, the same for every implementation.

    Every row is one sequence without padding, so that the counts of `benchmarks.costs`, which are
    those of full rows, are what is computed.
    """
    rng = np.random.default_rng(seed)
    specs = program(case._replace(backward=False), dtype, None).specs
    names = argument_names(case, dtype)
    return [
        jnp.asarray(_MAKERS[name](rng, spec.shape, case), spec.dtype)
        for name, spec in zip(names, specs, strict=True)
    ]


def _normal(scale: float) -> Callable[..., Any]:
    def make(rng: np.random.Generator, shape: _Shape, case: Case) -> np.ndarray:
        x = rng.standard_normal(shape, np.float32)
        return np.multiply(x, np.float32(scale), out=x)

    return make


def _taps(rng: np.random.Generator, shape: _Shape, case: Case) -> np.ndarray:
    """An event as it is, and less of those before it the longer ago they are."""
    lags = np.arange(shape[-1], dtype=np.float32)
    return np.where(lags == 0, 1, rng.standard_normal(shape) / (1 + lags))


def _seconds(rng: np.random.Generator, shape: _Shape, case: Case) -> np.ndarray:
    """Gaps from a second to months, most of them minutes."""
    gaps = np.minimum(rng.lognormal(5, 3, shape), _LONGEST_ROW / shape[-1])
    return np.cumsum(gaps, axis=-1).astype(np.int32)


def _ones(rng: np.random.Generator, shape: _Shape, case: Case) -> np.ndarray:
    return np.ones(shape, np.int32)


def _labels(rng: np.random.Generator, shape: _Shape, case: Case) -> np.ndarray:
    assert isinstance(case.size, CatalogueShape)
    return rng.integers(0, case.size.items, shape, np.int32)


_MAKERS: dict[str, Callable[..., Any]] = {
    "query": _normal(1.0),
    "key": _normal(1.0),
    "value": _normal(1.0),
    "logits": _taps,
    "values": _taps,
    "places": _normal(0.02),
    "times": _normal(0.02),
    "seconds": _seconds,
    "ids": _ones,
    "hidden": _normal(1.0),
    "item_table": _normal(0.2),
    "labels": _labels,
}

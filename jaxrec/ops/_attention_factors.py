"""The factors of a positional kernel as the caller gives them: checked, and told apart."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrec.ops import _attention_mix
from jaxrec.ops._attention_core import block_for
from jaxrec.ops._checks import check_float

Structure = Literal["identity", "toeplitz", "full"]
Structures = Structure | tuple[Structure | None, Structure | None] | None
STRUCTURES = ("identity", "toeplitz", "full")


class Factor(NamedTuple):
    """One factor: no kernel (the identity), taps, or a full matrix; with an axis for heads."""

    structure: str
    kernel: Float[Array, "groups ..."] | None
    upper: bool

    @property
    def size(self) -> int:
        return 0 if self.kernel is None else self.kernel.shape[-1]


def factor(
    op: str, name: str, kernel: Any, structure: str | None, heads: int, *, upper: bool
) -> Factor:
    """Tells what `kernel` is, or says why it is nothing of the kind."""
    if structure is not None and structure not in STRUCTURES:
        raise ValueError(
            f"{op}: structure must be one of {', '.join(map(repr, STRUCTURES))} or None, "
            f"got {structure!r}"
        )
    if kernel is None:
        return Factor("identity", None, upper)
    kernel = jnp.asarray(kernel)
    check_float(op, name, kernel)
    shape = kernel.shape
    taps = kernel.ndim == 1 or (kernel.ndim == 2 and shape[0] == heads)
    full = kernel.ndim == 2 or (kernel.ndim == 3 and shape[0] == heads)
    full = full and shape[-1] == shape[-2]
    if kernel.size == 0 or not (taps or full):
        raise ValueError(
            f"{op}: {name} must be None (identity), taps [width] or [heads, width], or a full "
            f"factor [size, size] or [heads, size, size], with heads={heads}; got shape {shape}"
        )
    if structure is None:
        if taps and full:
            raise ValueError(
                f"{op}: {name} of shape {shape} can be taps [heads, width] or a full factor "
                "[size, size]; say which with structure='toeplitz' or structure='full'"
            )
        structure = "toeplitz" if taps else "full"
    if structure == "identity":
        raise ValueError(f"{op}: structure='identity' takes no kernel, but {name} was given")
    if not (taps if structure == "toeplitz" else full):
        wanted = "[width] or [heads, width]" if structure == "toeplitz" else "[size, size]"
        wanted += "" if structure == "toeplitz" else " or [heads, size, size]"
        raise ValueError(
            f"{op}: {name} must be {wanted} for structure={structure!r} and heads={heads}, "
            f"got shape {shape}"
        )
    shared = kernel.ndim == (1 if structure == "toeplitz" else 2)
    return Factor(structure, kernel[None] if shared else kernel, upper)


def factors(
    op: str, logit_kernel: Any, value_kernel: Any, structure: Structures, tie: bool, heads: int
) -> tuple[Factor, Factor]:
    """The factor of the logits and the factor of the values."""
    if isinstance(structure, (tuple, list)):
        if len(structure) != 2:
            raise ValueError(
                f"{op}: structure must be one name or a pair (logits, values), got {structure!r}"
            )
        for_logits, for_values = structure
    else:
        for_logits = for_values = structure
    logits = factor(op, "logit_kernel", logit_kernel, for_logits, heads, upper=True)
    if not tie:
        return logits, factor(op, "value_kernel", value_kernel, for_values, heads, upper=False)
    if value_kernel is not None:
        raise ValueError(
            f"{op}: tie=True mixes the values with logit_kernel too (L = U^T); "
            "give value_kernel=None"
        )
    if for_values not in (None, for_logits):
        raise ValueError(
            f"{op}: tie=True mixes the values by structure {for_logits!r} too, got {for_values!r}"
        )
    return logits, logits


def check_reach(op: str, name: str, factor: Factor, length: int) -> None:
    if factor.structure == "full" and factor.size < length:
        raise ValueError(
            f"{op}: {name} is a full factor of size {factor.size}, shorter than the sequence of "
            f"length {length}; cut the sequence to its last {factor.size} events, make the factor "
            "larger, or give positions"
        )


def apply(
    factor: Factor,
    x: Float[Array, "batch length heads width"],
    valid: Array | None,
    segment_ids: Array | None,
    positions: Int[Array, "batch length"] | None,
) -> Float[Array, "batch length heads width"]:
    """The mix by one factor. `positions` is what a full factor is read at; `None`: the slots."""
    if factor.kernel is None:
        return x
    if factor.structure == "toeplitz":
        positions = None
    options = _attention_mix.Options(factor.structure, factor.upper, block_for(x.shape[1]))
    inputs = _attention_mix.Inputs(factor.kernel, x, valid, segment_ids, positions)
    return _attention_mix.mix(options, inputs)

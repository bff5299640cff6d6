"""The arms of the position study: one base config, and what each arm changes in it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jaxrec.errors import UserError
from jaxrec.models.config import TransformerConfig
from jaxrec.training.config import Experiment


@dataclass(frozen=True)
class Arm:
    """What an arm changes in the base config, and what it is compared with."""

    name: str
    says: str
    """In the words of a table."""
    reference: str | None
    """The arm whose values are subtracted; none for the one that all start from."""
    model: Mapping[str, Any] = field(default_factory=dict)
    kernel: Mapping[str, Any] = field(default_factory=dict)

    def config(self, base: Experiment, *, data: str, seed: int) -> Experiment:
        """The experiment of this arm.

        The arms with a config file of their own bear its name, so that a run of either is a run of
        both: `additive` is the base itself, `kernel` is `sasrec_kernel.py`.

        Raises:
          UserError: the base is no model with a choice of position.
        """
        if not isinstance(base.model, TransformerConfig):
            raise UserError(f"{base.name}: {base.model.type} has no choice of position to study")
        model = replace(base.model, kernel=replace(base.model.kernel, **self.kernel), **self.model)
        words = self.name.replace("+", "_").replace("-", "_")
        return replace(
            base,
            name=base.name if self.name == "additive" else f"{base.name}_{words}",
            model=model,
            data=replace(base.data, name=data),
            training=replace(base.training, seed=seed),
        )


def _scheme(name: str, says: str, position: str) -> Arm:
    reference = None if name == "additive" else "additive"
    return Arm(name, says, reference, {"position": position})


def _factor(name: str, says: str, **changes: Any) -> Arm:
    return Arm(name, says, "kernel", {"position": "kernel"}, changes)


SCHEMES: tuple[Arm, ...] = (
    _scheme("additive", "additive vectors at the input", "additive"),
    _scheme("kernel", "positional kernel (Toeplitz, full length, a pair a block)", "kernel"),
    _scheme("none", "no position", "none"),
    _scheme("rope", "RoPE", "rope"),
    _scheme("t5", "T5's bias by buckets of distance", "t5"),
    _scheme("alibi", "ALiBi (slope 1/256, as one head has it)", "alibi"),
    _scheme("relative", "HSTU's bias by distance", "relative"),
    _scheme("additive+kernel", "additive vectors and positional kernel", "additive+kernel"),
)

FACTORS: tuple[Arm, ...] = (
    _factor("kernel-logits", "kernel on the logits alone", values="identity"),
    _factor("kernel-values", "kernel on the values alone", logits="identity"),
    _factor("kernel-toeplitz-full", "Toeplitz on the logits, full on the values", values="full"),
    _factor("kernel-full-toeplitz", "full on the logits, Toeplitz on the values", logits="full"),
    _factor("kernel-full", "full on both", logits="full", values="full"),
    _factor("kernel-band-2", "Toeplitz, 2 taps", band=2),
    _factor("kernel-band-4", "Toeplitz, 4 taps", band=4),
    _factor("kernel-band-16", "Toeplitz, 16 taps", band=16),
    _factor("kernel-shared", "one kernel for all blocks", shared=True),
    _factor("kernel-tied", "value factor is the logit factor transposed", tie=True),
    _factor("kernel-powerlaw", "starts as a power law, not as the identity", init="powerlaw"),
    Arm(
        "alibi-steep",
        "ALiBi with slope 1/16",
        "alibi",
        {"position": "alibi", "alibi_slope": 1 / 16},
    ),
)

ARMS: dict[str, Arm] = {arm.name: arm for arm in (*SCHEMES, *FACTORS)}


def arm_named(name: str) -> Arm:
    """The arm of this name.

    Raises:
      UserError: there is none.
    """
    if name not in ARMS:
        raise UserError(f"--arms {name}: no such arm; there are {', '.join(ARMS)}")
    return ARMS[name]

"""What a TPU chip can do, for rooflines: the makers' figures, per chip."""

from typing import NamedTuple

from jaxrec.errors import UserError


class Chip(NamedTuple):
    """One TPU chip.

    `flops_per_cycle` and `bytes_per_cycle` are of dense bfloat16 products and of the main memory;
    `device_kinds` are the names that JAX has for its devices.
    """

    name: str
    topology: str
    hertz: float
    flops_per_cycle: int
    hbm_bytes_per_second: float
    hbm_bytes: int
    vmem_bytes: int
    device_kinds: tuple[str, ...]

    @property
    def bytes_per_cycle(self) -> float:
        return self.hbm_bytes_per_second / self.hertz

    def roofline_seconds(self, flops: float, moved: float) -> float:
        """The least time for so many FLOPs of matrix products and bytes of main memory."""
        return max(flops / (self.flops_per_cycle * self.hertz), moved / self.hbm_bytes_per_second)


_MIB = 1 << 20
# FLOPs a cycle: four units of 128 x 128 on v5e, two of 256 x 256 at two rows a cycle on v6e, a
# multiplication and an addition each. Together with the clock they give 197 and 918 TFLOP/s.
_KINDS = {"v5e": ("TPU v5 lite", "TPU v5e"), "v6e": ("TPU v6 lite", "TPU v6e")}
CHIPS: dict[str, Chip] = {
    "v5e": Chip("v5e", "v5e:2x2", 1.5e9, 131_072, 819e9, 16 << 30, 128 * _MIB, _KINDS["v5e"]),
    "v6e": Chip("v6e", "v6e:2x2", 1.75e9, 524_288, 1_640e9, 32 << 30, 128 * _MIB, _KINDS["v6e"]),
}


def chip_named(name: str) -> Chip:
    """The chip of this name.

    Raises:
      UserError: there is none.
    """
    if name not in CHIPS:
        raise UserError(f"no chip {name!r}; there are {', '.join(CHIPS)}")
    return CHIPS[name]

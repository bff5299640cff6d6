"""What a TPU chip can do, for rooflines: the makers' figures, per chip."""

from typing import NamedTuple

from jaxrec.errors import UserError
from jaxrec_kernels.generations import V5E, V6E


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


_MIB, _GIB = 1 << 20, 1 << 30
# FLOPs a cycle: four units of 128 x 128 a core, from v6e on two of 256 x 256 at two rows a cycle, a
# multiplication and an addition each. Together with the clock they give a v5e 197 TFLOP/s and a v6e
# 918. The two cores of a v4 or TPU7x are a device each in what is compiled ahead of time, and these
# are the figures of one; those of a v5p are one device, and share the parallel part of a grid.
_ALL = (
    Chip("v5e", "v5e:2x2", 1.5e9, 1 << 17, 819e9, 16 * _GIB, 128 * _MIB, V5E),
    Chip("v6e", "v6e:2x2", 1.75e9, 1 << 19, 1640e9, 32 * _GIB, 128 * _MIB, V6E),
    Chip("v4", "v4:2x2x1", 1.05e9, 1 << 17, 614e9, 16 * _GIB, 16 * _MIB, ("TPU v4",)),
    Chip("v5p", "v5p:2x2x1", 1.75e9, 1 << 18, 2765e9, 95 * _GIB, 64 * _MIB, ("TPU v5", "TPU v5p")),
    Chip("tpu7x", "tpu7x:2x2x1", 2.2e9, 1 << 19, 3690e9, 96 * _GIB, 64 * _MIB, ("TPU7x",)),
)
CHIPS: dict[str, Chip] = {chip.name: chip for chip in _ALL}


def chip_named(name: str) -> Chip:
    """The chip of this name.

    Raises:
      UserError: there is none.
    """
    if name not in CHIPS:
        raise UserError(f"no chip {name!r}; there are {', '.join(CHIPS)}")
    return CHIPS[name]

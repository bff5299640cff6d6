"""How much is in a region of the kernels that the compiler schedules by itself.

More takes fewer cycles, since what a product waits for is then hidden by others, until registers
are spilled. Found by the compiler's schedules of the named shapes, a chip at a time: what is best
on a v5e spills on the wider matrix units of a v6e.
"""

from typing import NamedTuple

from jaxrec_kernels.generations import V5E, V6E


class Regions(NamedTuple):
    """Tiles are of 128 x 128 weights, or of an operator."""

    group_tiles: int = 32  # of weights, in slabs that are computed at once
    lot_tiles: int = 8  # of weights, that go through a stage together
    lot_tiles_of_heads: int = 7  # likewise, where heads of a row share masks, kept in registers
    first_jobs_alone: bool = False  # each of the first lot, which nothing is scheduled with
    slots: int = 512  # of batch rows, that are read or written
    mix_tiles: int = 16  # of operators, where each batch row of a slab has its own mask
    mix_tiles_of_slabs: int = 12  # likewise, where all have one; of several slabs
    mix_tiles_alone: int = 4  # likewise, of one slab
    product_tiles: int = 4  # of a product along one axis of an operator
    depth_tiles: int = 1  # that such a product has a multiple of, where there are so many
    gradient_tiles: int = 4  # of operators' gradients
    gradient_tiles_of_slabs: int = 6  # likewise, where all rows have one mask; of several slabs
    gradient_parts: int = 2  # products that are summed for a tile of such a gradient


# Longer rows are never side by side in the lanes.
SHORT = 256


def regions_for(device_kind: str | None, length: int) -> Regions:
    """Those for rows of this length; the same for all chips where nothing says which it is.

    Args:
      device_kind: as `tuning.device_kind` gives it.
      length: of a row.
    """
    if device_kind in V5E:
        return Regions(group_tiles=48, slots=1024, gradient_tiles_of_slabs=12)
    if device_kind in V6E:
        wide = Regions(gradient_tiles_of_slabs=12)
        if length <= SHORT:
            return wide
        # The depth of its matrix units is 256: an odd number of tiles takes as long as one more.
        return wide._replace(depth_tiles=2, first_jobs_alone=True)
    return Regions()

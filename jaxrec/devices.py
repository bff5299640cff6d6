"""Where the arrays of a run lie on several devices.

The mesh has two axes: sequences are split over `data`, the rows of the item table (and of its
optimiser's moments) over `model`; everything else is on every device.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxrec.errors import UserError
from jaxrec.processes import to_host

DATA, MODEL = "data", "model"
EVERYWHERE = PartitionSpec()
BY_SEQUENCE = PartitionSpec(DATA)
BY_ITEM = PartitionSpec(MODEL)


def make_mesh(data: int, model: int) -> Mesh | None:
    """A mesh of `data` x `model` devices; None for a single one.

    Several processes must use all of their devices. Those of one process stand side by side, so
    that `model` lies within a process where it divides the number of its devices; on a TPU the
    order is that of its network.

    Args:
      data: 0 for all that `model` leaves.
      model: at least 1.

    Raises:
      UserError: there are not as many devices, or several processes would leave some out.
    """
    devices = jax.device_count()
    data = data or max(1, devices // model)
    if data * model > devices:
        raise UserError(
            f"config: mesh.data x mesh.model is {data} x {model}, but there are {devices} devices"
        )
    if jax.process_count() > 1 and data * model < devices:
        raise UserError(
            f"config: mesh.data x mesh.model is {data} x {model}, but the {jax.process_count()} "
            f"processes have {devices} devices and must use all of them; mesh.data 0 takes all "
            "that mesh.model leaves"
        )
    if data * model == 1:
        return None
    return jax.make_mesh(
        (data, model),
        (DATA, MODEL),
        axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[: data * model],
    )


class Placement:
    """What lies where.

    Args:
      mesh: with the axes `data` and `model`; of devices, or of a topology that is compiled for.
      by_item: names of the parameters whose rows are items.
      num_items: items of the catalogue.
    """

    def __init__(self, mesh: Mesh, by_item: tuple[str, ...], num_items: int) -> None:
        self.mesh = mesh
        self.num_items = num_items
        self._by_item = frozenset(by_item)
        self.data, self.model = mesh.shape[DATA], mesh.shape[MODEL]
        # Every device along `model` has the same number of rows; those past the last are padding.
        self.rows = -(-num_items // self.model) * self.model

    def specs(self, tree: Any) -> Any:
        """The partition of every array of a train state or of parameters, by its name."""
        return jax.tree_util.tree_map_with_path(lambda path, _: self._spec(path), tree)

    def _spec(self, path: Any) -> PartitionSpec:
        names = {getattr(entry, "key", None) for entry in path}
        return BY_ITEM if names & self._by_item else EVERYWHERE

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def held(self, tree: Any) -> Any:
        """Shapes and shardings on the mesh: item tables padded to a multiple of `model` rows.

        Args:
          tree: arrays or shapes of a train state or of parameters, as one device has them.
        """

        def one(spec: PartitionSpec, x: Any) -> jax.ShapeDtypeStruct:
            rows = (self.rows,) if self._is_table(spec, x) else x.shape[:1]
            shape = (*rows, *x.shape[1:])
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=self.sharding(spec))

        return jax.tree.map(one, self.specs(tree), tree)

    def pad(self, tree: Any) -> Any:
        """Under jit: the values of `held`, from those that one device has; the padding is zero."""

        def one(spec: PartitionSpec, x: Array) -> Array:
            if not self._is_table(spec, x):
                return x
            # Said here too, so that what is padded is split already.
            x = jax.lax.with_sharding_constraint(x, self.sharding(spec))
            return jnp.pad(x, [(0, self.rows - self.num_items)] + [(0, 0)] * (x.ndim - 1))

        return jax.tree.map(one, self.specs(tree), tree)

    def stored(self, tree: Any) -> Any:
        """Shapes without the padding: those of `take`, and of a checkpoint on any mesh."""

        def one(spec: PartitionSpec, x: Any) -> jax.ShapeDtypeStruct:
            rows = (self.num_items,) if self._is_padded(spec, x) else x.shape[:1]
            return jax.ShapeDtypeStruct((*rows, *x.shape[1:]), x.dtype)

        return jax.tree.map(one, self.specs(tree), tree)

    def take(self, tree: Any) -> Any:
        """What a checkpoint holds: `held` without the padding.

        Rows that the devices do not divide evenly cannot lie split on them. So a padded table goes
        to the host, in every process, as a NumPy array of all its rows; anything else stays where
        it is. Called by all processes.
        """

        def one(spec: PartitionSpec, x: Array) -> Any:
            return to_host(x)[: self.num_items] if self._is_padded(spec, x) else x

        return jax.tree.map(one, self.specs(tree), tree)

    def _is_table(self, spec: PartitionSpec, x: Any) -> bool:
        return spec == BY_ITEM and x.shape[:1] == (self.num_items,)

    def _is_padded(self, spec: PartitionSpec, x: Any) -> bool:
        return spec == BY_ITEM and x.shape[:1] == (self.rows,) and self.rows > self.num_items

    def batch(self, arrays: dict[str, Any]) -> dict[str, Array]:
        """A batch on the mesh; the first axis of every array is split over `data`."""
        target = self.sharding(BY_SEQUENCE)

        def put(array: np.ndarray) -> Array:
            return jax.make_array_from_callback(array.shape, target, lambda part: array[part])

        return {name: put(array) for name, array in arrays.items()}

    def item_mask(self, mask: np.ndarray | None) -> np.ndarray | None:
        """bool[num_items] with False for the padding."""
        return None if mask is None else np.pad(mask, (0, self.rows - self.num_items))

    def over_devices(self, f: Callable[..., Any], in_specs: Any, out_specs: Any) -> Any:
        """`f` on every device's part, all axes manual."""
        return jax.shard_map(f, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)

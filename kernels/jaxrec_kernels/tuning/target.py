"""Which kind of TPU a trace is for.

What is traced is cached by `jax.jit`, so the answer may only depend on what JAX itself caches by:
the mesh that is set, and the process's default backend, which never changes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.sharding import AbstractDevice


def device_kind() -> str | None:
    """The `device_kind` of the TPU that is compiled for; None where nothing says so.

    The device of the mesh that is set (`jax.set_mesh`, `jax.shard_map`, `compiling_for`), else the
    TPU that this process runs on. On a CPU without a target it is None.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.device_kind if device.platform == "tpu" else None
    return jax.devices()[0].device_kind if jax.default_backend() == "tpu" else None


@contextmanager
def compiling_for(device_kind: str) -> Iterator[None]:
    """Inside, what is traced is for TPUs of this kind: "TPU v5 lite", "TPU v6 lite".

    The mesh that is set keeps its axes. The kind is part of what `jax.jit` caches by: a function
    that was traced outside, or for another kind, is traced again.

    Args:
      device_kind: as a device of `jax.devices()` names it.
    """
    device = AbstractDevice(device_kind, num_cores=1, platform="tpu")
    mesh = jax.sharding.get_abstract_mesh().update(abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield

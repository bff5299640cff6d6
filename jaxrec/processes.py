"""Several processes that train together, as `jax.distributed` connects them.

Each runs the same program on devices of its own. The first alone writes files, and what it does
alone the others wait for. Every function here is called by all processes, in the same order; in a
single process none of them does anything of its own.
"""

import itertools
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax import Array
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import NDArray

from jaxrec.errors import UserError

# How often a process looks whether another has failed, and how long it may take to fail of the same
# cause, which it then tells itself.
_LOOK_SECONDS = 1.0
_GRACE_SECONDS = 5.0

# Of an array that goes from the devices of several processes to the host.
_BLOCK_BYTES = 1 << 26

# No JSON.
_STOPPED = "stopped"
# A note on an error that the others meet at the same call: nobody has to look for it.
_TOLD = "the other processes have been told"

Result = TypeVar("Result")

# Processes call in the same order, so the same number names the same call in all of them.
_calls = itertools.count()


def count() -> int:
    """How many processes there are."""
    return jax.process_count()


def first() -> bool:
    """Whether this is the process that writes files."""
    return jax.process_index() == 0


def agreed(action: Callable[[], Result]) -> Result | None:
    """Lets the first process alone do something; the others go on when it has gone well.

    Args:
      action: what the first process does; its errors are its own.

    Returns:
      What `action` returned in the first process, None in the others.

    Raises:
      UserError: in the others, if the first process has failed.
    """
    if count() == 1:
        return action()
    result: list[Result] = []
    first_says(lambda: result.append(action()))
    return result[0] if first() else None


def first_says(action: Callable[[], Result]) -> Result:
    """What `action` gives in the first process, in all of them.

    Files are looked at like this where processes must not differ in what they see: a shared file
    system may show one of them an older state.

    Args:
      action: gives a value that JSON can hold.

    Raises:
      UserError: in the others, if the first process has failed.
    """
    if count() == 1:
        return action()
    key = f"jaxrec/agreed/{next(_calls)}"
    if not first():
        said = _wait_for(key)
        if said == _STOPPED:
            error = UserError("process 0 stopped: see its message")
            error.add_note(_TOLD)
            raise error
        return cast(Result, json.loads(said))
    try:
        result = action()
        said = json.dumps(result)
    except BaseException as error:
        _client().key_value_set(key, _STOPPED)
        error.add_note(_TOLD)
        raise
    _client().key_value_set(key, said)
    return result


def in_turn(action: Callable[[], Result]) -> Result:
    """Does something in the first process, and then in the others: it may make what they find.

    Raises:
      UserError: in the others, if the first process has failed; whatever `action` raises.
    """
    if first():
        return cast(Result, agreed(action))
    agreed(action)
    return action()


def highest(number: int) -> int:
    """The highest of all processes' numbers, each an int32.

    It is found on the devices: where it is known, what was sent to them before has been done.
    """
    if count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.asarray(number, np.int32)).max())


def to_host(array: Array) -> NDArray[Any]:
    """All of an array, in every process; no device is given more than it has, and a block.

    Each process reads its own devices where they have the whole. Where they do not, what the others
    have comes in blocks, each of them on all devices for a moment.
    """
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    whole = np.empty(array.shape, array.dtype)
    if _everywhere_whole(array):
        for shard in array.addressable_shards:
            whole[shard.index] = np.asarray(shard.data)
        return whole
    # Of every part the same rows together: cut across parts, an array would be gathered first.
    assert isinstance(array.sharding, NamedSharding)
    rows = array.sharding.shard_shape(array.shape)[0]
    parts = whole.reshape(-1, rows, *array.shape[1:])
    size = max(1, min(rows, _BLOCK_BYTES * rows // max(1, whole.nbytes)))
    for start in range(0, rows, size):
        start = min(start, rows - size)
        block = _rows_of_parts(array.sharding, size)(array, np.int32(start))
        found = np.asarray(multihost_utils.process_allgather(block, tiled=True))
        parts[:, start : start + size] = found.reshape(len(parts), size, *array.shape[1:])
    return whole


def _everywhere_whole(array: Array) -> bool:
    """Whether the devices of each process have all of an array, as every process knows it."""
    places: dict[int, set[Any]] = {}
    indices: Mapping[Any, Any] = array.sharding.devices_indices_map(array.shape)
    for device, index in indices.items():
        place = tuple(part.indices(size) for part, size in zip(index, array.shape, strict=True))
        places.setdefault(device.process_index, set()).add(place)
    return all(own == set().union(*places.values()) for own in places.values())


@lru_cache(maxsize=8)
def _rows_of_parts(sharding: NamedSharding, size: int) -> Callable[..., Array]:
    """(array, start) -> `size` rows from `start` on of every device's part of the first axis."""
    assert not any(sharding.spec[1:])

    def cut(part: Array, start: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(part, start, size)

    specs = (sharding.spec, PartitionSpec())
    whole = jax.shard_map(cut, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.spec)
    return jax.jit(whole)


@contextmanager
def stopping_together(*together: type[BaseException]) -> Iterator[None]:
    """Inside, a process that fails ends the others, and nobody leaves before all are through.

    A process that waits for others in the middle of a computation cannot be told that one of them
    will not come. So each looks now and then whether another has failed; then it says so in one
    line and ends with exit code 2, unless it fails within seconds itself.

    Args:
      together: exceptions that all processes raise at the same point of the program.
    """
    if count() == 1:
        yield
        return
    key, left = f"jaxrec/stopped/{next(_calls)}", threading.Event()
    watch = threading.Thread(target=_end_with_the_others, args=(key, left), daemon=True)
    watch.start()
    try:
        yield
        highest(0)
    except together:
        raise
    except BaseException as error:
        if _TOLD not in getattr(error, "__notes__", ()):
            # The first to fail is the one to look at.
            with suppress(jax.errors.JaxRuntimeError):
                _client().key_value_set(key, str(jax.process_index()))
        raise
    finally:
        left.set()
        watch.join()


def _end_with_the_others(key: str, left: threading.Event) -> None:
    while not left.wait(_LOOK_SECONDS):
        try:
            process = _client().key_value_try_get(key)
        except jax.errors.JaxRuntimeError:
            continue
        if left.wait(_GRACE_SECONDS):
            return
        print(f"jaxrec: process {process} stopped: see its message", file=sys.stderr, flush=True)
        # The one that failed waits for the others before it ends.
        with suppress(jax.errors.JaxRuntimeError):
            jax.distributed.shutdown()
        os._exit(2)


def _wait_for(key: str) -> str:
    while True:
        try:
            # In short pieces, so that Ctrl-C is heard.
            return _client().blocking_key_value_get(key, int(1000 * _LOOK_SECONDS))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _client() -> Any:
    """The coordination service, for which JAX has no public name."""
    return distributed.global_state.client

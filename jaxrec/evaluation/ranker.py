"""A model's ranked lists over the full catalogue, computed on the device in batches of users."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from jaxrec import ops
from jaxrec.data.batches import ContextBatches
from jaxrec.data.ranges import events_of
from jaxrec.devices import BY_ITEM, BY_SEQUENCE, MODEL, Placement
from jaxrec.processes import to_host

Parameters = dict[str, Array]

# Widths of the arrays of seen items: users are grouped by the smallest that holds their history, so
# that a few long histories do not widen everybody's, and few shapes are compiled.
_SEEN_WIDTHS = (64, 512, 4096, 32768, 1 << 30)


class Contexts:
    """Event ranges to rank items for, batched once and ranked as often as wanted.

    Args:
      items: int32[events], flat item column that the ranges point into.
      starts, stops: int64[m], the ranges, each at least one event.
      batch_size: ranges ranked at once.
      max_length, packed, count_from_newest, shards, timestamps: how the model reads sequences; see
        `TrainingBatches`.
    """

    def __init__(
        self,
        items: NDArray[np.int32],
        starts: NDArray[np.int64],
        stops: NDArray[np.int64],
        *,
        batch_size: int,
        max_length: int,
        packed: bool = True,
        count_from_newest: bool = False,
        shards: int = 1,
        timestamps: NDArray[np.int64] | None = None,
    ) -> None:
        self.items = items
        self.starts, self.stops = np.asarray(starts), np.asarray(stops)
        lengths = self.stops - self.starts
        group = np.searchsorted(_SEEN_WIDTHS, lengths)
        self._groups: list[tuple[NDArray[np.int64], int, ContextBatches]] = []
        for g in np.unique(group):
            chosen = np.flatnonzero(group == g)
            width = min(_SEEN_WIDTHS[g], 1 << int(lengths[chosen].max() - 1).bit_length())
            batches = ContextBatches(
                items,
                self.starts[chosen],
                self.stops[chosen],
                batch_size=batch_size,
                max_length=max_length,
                packed=packed,
                count_from_newest=count_from_newest,
                shards=shards,
                timestamps=timestamps,
            )
            self._groups.append((chosen, max(1, width), batches))

    def __len__(self) -> int:
        return len(self.starts)

    def batches(self) -> Iterator[tuple[NDArray[np.int64], dict[str, Any], NDArray[np.int32]]]:
        """Yields (which ranges, -1 for none; arrays for the model; seen items padded with -1)."""
        for chosen, width, batches in self._groups:
            for number in range(len(batches)):
                columns, last, within = batches[number]
                used = np.flatnonzero(within >= 0)
                which = np.full(len(within), -1, np.int64)
                which[used] = chosen[within[used]]
                starts, stops = self.starts[which[used]], self.stops[which[used]]
                seen = np.full((len(within), width), -1, np.int32)
                owners = np.repeat(np.arange(len(used)), stops - starts)
                events = events_of(starts, stops)
                seen[used[owners], events - starts[owners]] = self.items[events]
                yield which, {**columns, "last": last}, seen


class Ranker:
    """Ranks items with a model; compiled functions are kept between calls.

    Args:
      bind: parameters -> model, as `jaxrec.models.binding.split_model` gives it.
      placement: on several devices, what lies where; the parameters must lie so, and the contexts
        have a shard for every part that sequences are split into.
    """

    def __init__(
        self, bind: Callable[[Parameters], Any], placement: Placement | None = None
    ) -> None:
        self._placement = placement
        states: Callable[..., Any] = partial(_states, bind)
        top: Callable[..., Any] = partial(_top, bind)
        if placement is not None:
            states, top = _states_on_mesh(bind, placement), _top_on_mesh(bind, placement)
        self._states = jax.jit(states)
        self._top = jax.jit(top, static_argnames="k")

    def _to_device(self, arrays: Any) -> Any:
        return arrays if self._placement is None else self._placement.batch(arrays)

    def states(self, parameters: Parameters, contexts: Contexts) -> NDArray[np.float32]:
        """float32[m, width]: the state after each range's newest event."""
        result: NDArray[np.float32] | None = None
        for which, arrays, _ in contexts.batches():
            states = to_host(self._states(parameters, self._to_device(arrays)))
            if result is None:
                result = np.empty((len(contexts), states.shape[1]), np.float32)
            used = which >= 0
            result[which[used]] = states[used].astype(np.float32)
        return result if result is not None else np.empty((0, 0), np.float32)

    def lists(
        self,
        parameters: Parameters,
        contexts: Contexts,
        k: int,
        *,
        filter_seen: bool,
        allow: Any = None,
        deny: Any = None,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """The `k` best items for each range.

        Args:
          parameters: of the model.
          contexts: what to rank for.
          k: length of the lists.
          filter_seen: leave out every item of the range itself.
          allow, deny: bool[num_items], items that may, or may not, appear.
          progress: called with the number of ranges done since the last call.

        Returns:
          Scores float32[m, k] and item indices int32[m, k], best first; -inf and -1 where there
          are fewer than `k` candidates. Ties go to the lower index.
        """
        if self._placement is not None:
            allow, deny = map(self._placement.item_mask, (allow, deny))
        scores = np.full((len(contexts), k), -np.inf, np.float32)
        lists = np.full((len(contexts), k), -1, np.int32)

        def collect(which: NDArray[np.int64], result: tuple[Array, Array]) -> None:
            used = which >= 0
            scores[which[used]] = to_host(result[0])[used]
            lists[which[used]] = to_host(result[1])[used]
            if progress is not None:
                progress(int(used.sum()))

        # The next batch is made while the device ranks this one.
        pending: tuple[NDArray[np.int64], tuple[Array, Array]] | None = None
        for which, arrays, seen in contexts.batches():
            states = self._states(parameters, self._to_device(arrays))
            exclude = self._to_device({"seen": seen})["seen"] if filter_seen else None
            result = self._top(parameters, states, exclude, allow, deny, k=k)
            if pending is not None:
                collect(*pending)
            pending = (which, result)
        if pending is not None:
            collect(*pending)
        return scores, lists


def _states(bind: Callable[[Parameters], Any], parameters: Parameters, arrays: Any) -> Array:
    model = bind(parameters)
    if hasattr(model, "newest"):
        states: Array = model.newest(**arrays)
        return states
    # A model of the user's own need not have more than `hidden`.
    hidden = model.hidden(**{k: v for k, v in arrays.items() if k != "last"})
    return hidden.reshape(-1, hidden.shape[-1])[arrays["last"]]


def _top(
    bind: Callable[[Parameters], Any],
    parameters: Parameters,
    states: Array,
    exclude: Array | None,
    allow: Array | None,
    deny: Array | None,
    *,
    k: int,
) -> tuple[Array, Array]:
    return _top_of(bind(parameters), states, exclude, allow, deny, k=k)


def _top_of(
    model: Any,
    states: Array,
    exclude: Array | None,
    allow: Array | None,
    deny: Array | None,
    **options: Any,
) -> tuple[Array, Array]:
    table = model.item_table()
    return ops.top_k_items(
        states.astype(jnp.promote_types(states.dtype, table.dtype)),
        table,
        exclude=exclude,
        allow=allow,
        deny=deny,
        **options,
    )


def _states_on_mesh(bind: Callable[[Parameters], Any], placement: Placement) -> Callable[..., Any]:
    def part(parameters: Parameters, arrays: Any) -> Array:
        return _states(lambda parameters: _on_mesh(bind, parameters), parameters, arrays)

    def whole(parameters: Parameters, arrays: Any) -> Any:
        in_specs = (placement.specs(parameters), BY_SEQUENCE)
        return placement.over_devices(part, in_specs, BY_SEQUENCE)(parameters, arrays)

    return whole


def _top_on_mesh(bind: Callable[[Parameters], Any], placement: Placement) -> Callable[..., Any]:
    def whole(
        parameters: Parameters, states: Array, exclude: Any, allow: Any, deny: Any, *, k: int
    ) -> Any:
        def part(parameters: Parameters, *arrays: Any) -> tuple[Array, Array]:
            model, items = _on_mesh(bind, parameters), placement.num_items
            return _top_of(model, *arrays, k=k, item_axis=MODEL, num_items=items)

        specs = (placement.specs(parameters), BY_SEQUENCE, BY_SEQUENCE, BY_ITEM, BY_ITEM)
        on_devices = placement.over_devices(part, specs, BY_SEQUENCE)
        return on_devices(parameters, states, exclude, allow, deny)

    return whole


def _on_mesh(bind: Callable[[Parameters], Any], parameters: Parameters) -> Any:
    model = bind(parameters)
    model.item_axis = MODEL
    return model

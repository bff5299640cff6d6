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
from jaxrec.data.batches import ContextBatches, gather_index

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
      max_length, packed, count_from_newest: how the model reads sequences.
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
            )
            self._groups.append((chosen, max(1, width), batches))

    def __len__(self) -> int:
        return len(self.starts)

    def batches(self) -> Iterator[tuple[NDArray[np.int64], dict[str, Any], NDArray[np.int32]]]:
        """Yields (which ranges, arrays for the model, seen items padded with -1)."""
        for chosen, width, batches in self._groups:
            for number in range(len(batches)):
                rows, last, within = batches[number]
                which = chosen[within]
                lengths = self.stops[which] - self.starts[which]
                seen = np.full((batches.batch_size, width), -1, np.int32)
                owners = np.repeat(np.arange(len(which)), lengths)
                events = gather_index(self.starts[which], lengths)
                seen[owners, events - self.starts[which][owners]] = self.items[events]
                arrays = {
                    "items": rows.items,
                    "valid": rows.valid,
                    "segment_ids": rows.segment_ids,
                    "positions": rows.positions,
                    "last": last,
                }
                yield which, arrays, seen


class Ranker:
    """Ranks items with a model; compiled functions are kept between calls.

    Args:
      bind: parameters -> model, as `jaxrec.models.binding.split_model` gives it.
    """

    def __init__(self, bind: Callable[[Parameters], Any]) -> None:
        self._states = jax.jit(partial(_states, bind))
        self._top = jax.jit(partial(_top, bind), static_argnames="k")

    def states(self, parameters: Parameters, contexts: Contexts) -> NDArray[np.float32]:
        """float32[m, width]: the state after each range's newest event."""
        result: NDArray[np.float32] | None = None
        for which, arrays, _ in contexts.batches():
            states = np.asarray(self._states(parameters, arrays), np.float32)
            if result is None:
                result = np.empty((len(contexts), states.shape[1]), np.float32)
            result[which] = states[: len(which)]
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
        scores = np.full((len(contexts), k), -np.inf, np.float32)
        lists = np.full((len(contexts), k), -1, np.int32)

        def collect(which: NDArray[np.int64], result: tuple[Array, Array]) -> None:
            scores[which] = np.asarray(result[0])[: len(which)]
            lists[which] = np.asarray(result[1])[: len(which)]
            if progress is not None:
                progress(len(which))

        # The next batch is made while the device ranks this one.
        pending: tuple[NDArray[np.int64], tuple[Array, Array]] | None = None
        for which, arrays, seen in contexts.batches():
            states = self._states(parameters, arrays)
            exclude = seen if filter_seen else None
            result = self._top(parameters, states, exclude, allow, deny, k=k)
            if pending is not None:
                collect(*pending)
            pending = (which, result)
        if pending is not None:
            collect(*pending)
        return scores, lists


def _states(bind: Callable[[Parameters], Any], parameters: Parameters, arrays: Any) -> Array:
    hidden = bind(parameters).hidden(
        arrays["items"],
        valid=arrays["valid"],
        segment_ids=arrays["segment_ids"],
        positions=arrays["positions"],
    )
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
    table = bind(parameters).item_table()
    return ops.top_k_items(
        states.astype(jnp.promote_types(states.dtype, table.dtype)),
        table,
        k,
        exclude=exclude,
        allow=allow,
        deny=deny,
    )

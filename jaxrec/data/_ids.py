"""Original ids of users or items: index to id and back."""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxrec.errors import UserError

_CANONICAL = re.compile(r"0|-?[1-9][0-9]*")
_SEARCHED_FOR_HINTS = 20_000

Id = int | str


def as_id_array(ids: Any, what: str) -> pa.Array:
    """Ids as an Arrow array of int64 or string, one row an index.

    Raises:
        ValueError: for other types, missing ids, or an id that stands twice.
    """
    array = ids
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if not isinstance(array, pa.Array):
        array = pa.array(ids)
    if pa.types.is_integer(array.type):
        array = array.cast(pa.int64())
    elif pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        array = array.cast(pa.string())
    else:
        raise ValueError(f"{what}_ids must be integers or strings, not {array.type}")
    if array.null_count:
        raise ValueError(f"{what}_ids has {array.null_count} missing ids")
    if pc.count_distinct(array).as_py() != len(array):
        raise ValueError(f"{what}_ids holds an id twice; each index needs an id of its own")
    return array


# So many ids are looked for one by one; for more it is faster to hash those of the set.
_FEW = 32


class IdIndex:
    """Maps indices to original ids and back; built once, looked up often."""

    def __init__(self, ids: pa.Array, what: str, set_name: str) -> None:
        self._ids = ids
        self._what = what
        self._set_name = set_name
        self.is_integer = pa.types.is_integer(ids.type)

    def __len__(self) -> int:
        return len(self._ids)

    def array(self) -> np.ndarray:
        """int64[n], or an object array of strings."""
        return self._ids.to_numpy(zero_copy_only=False)

    def id(self, index: int) -> Id:
        """Original id at an index.

        Raises:
            UserError: where the index is out of range.
        """
        if not 0 <= index < len(self._ids):
            raise UserError(
                f"{self._what} index {index} is out of range: {self._set_name} has "
                f"{len(self._ids):,} {self._what}s, indices 0 to {len(self._ids) - 1:,}"
            )
        return self._ids[int(index)].as_py()

    def find(self, given: Id) -> int:
        """Index of one original id, given as such or as its text.

        Raises:
            UserError: where the set does not know the id.
        """
        wanted = self._normal(given)
        index = -1 if wanted is None else pc.index(self._ids, wanted).as_py()
        if index < 0:
            raise UserError(
                f"{self._what} {given!r} is not in the data set {self._set_name}{self._hint(given)}"
            )
        return index

    def find_each(self, given: Iterable[Id]) -> np.ndarray:
        """int32: indices of original ids, as `find` for each of them.

        Raises:
            UserError: where the set does not know one.
        """
        given = list(given)
        if len(given) <= _FEW:
            return np.array([self.find(one) for one in given], np.int32)
        found = self.find_all(given)
        for unknown in np.flatnonzero(found < 0):
            self.find(given[unknown])
        return found

    def find_all(self, given: Sequence[Any] | np.ndarray | pa.Array | Iterable[Any]) -> np.ndarray:
        """Indices of original ids (or their texts), -1 where the set does not know one."""
        wanted = self._normalise(given)
        found = pc.index_in(wanted, value_set=self._ids)
        return found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)

    def _normalise(self, given: Any) -> pa.Array:
        array = given.combine_chunks() if isinstance(given, pa.ChunkedArray) else given
        if isinstance(array, np.ndarray):
            array = pa.array(array)
        if not isinstance(array, pa.Array):
            return pa.array([self._normal(one) for one in array], self._ids.type)
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        if pa.types.is_integer(array.type) or pa.types.is_null(array.type):
            return array.cast(self._ids.type)
        if not self.is_integer:
            return array.cast(pa.string())
        canonical = pc.match_substring_regex(array, r"^(0|-?[1-9][0-9]{0,18})$")
        try:
            return pc.if_else(canonical, array, pa.scalar(None, array.type)).cast(pa.int64())
        except pa.ArrowInvalid:  # nineteen digits, beyond int64
            return pa.array([self._normal(one) for one in array.to_pylist()], self._ids.type)

    def _normal(self, one: Any) -> Id | None:
        if isinstance(one, bool | np.bool_):
            return None
        if isinstance(one, int | np.integer):
            number = int(one)
            if not self.is_integer:
                return str(number)
            return number if -(2**63) <= number < 2**63 else None
        if isinstance(one, str):
            if not self.is_integer:
                return str(one)
            if not _CANONICAL.fullmatch(one) or not -(2**63) <= int(one) < 2**63:
                return None
            return int(one)
        return None

    def _hint(self, given: Any) -> str:
        if len(self._ids) == 0:
            return ""
        if self.is_integer:
            stripped = str(given).strip().lstrip("0") or "0"
            if self._normal(stripped) is not None and self.find_all([stripped])[0] >= 0:
                return f"; did you mean {stripped}?"
            span = pc.min_max(self._ids).as_py()
            return f"; its {self._what} ids are whole numbers from {span['min']} to {span['max']}"
        text = str(given)
        folded = pc.utf8_lower(pc.utf8_trim_whitespace(self._ids))
        near = pc.index(folded, text.strip().lower()).as_py()
        if near >= 0:
            return f"; did you mean {self._ids[near].as_py()!r}?"
        sample = self._ids.slice(0, _SEARCHED_FOR_HINTS).to_pylist()
        close = difflib.get_close_matches(text, sample, n=1, cutoff=0.75)
        if close:
            return f"; did you mean {close[0]!r}?"
        return f"; its {self._what} ids look like {self._ids[0].as_py()!r}"

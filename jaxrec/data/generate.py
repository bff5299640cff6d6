"""A made-up shop of series and genres, with an order in its events that can be learnt.

Items are parts of series ("Distant Comet Saga, part 2"), series belong to genres. What a user
takes next is, with the chances in `_CHANCES`,

- the sequel of what they took one, two or three events ago (the next part; after the last part
  the first part of a companion series, the same one for everybody), or
- a pick by popularity from the genre they are in, which changes now and then.

So order tells much more than popularity: a model that reads the last three events knows where
most of the next ones come from, and must find out at which lag. Popularity itself is skewed, some
events carry the same time, and ratings follow taste.
"""

import os
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from jaxrec.data._store import check_free
from jaxrec.data._vocabulary import ADJECTIVES, FORMS, GENRES
from jaxrec.data.paths import dataset_dir
from jaxrec.data.prepared import Interactions, write_prepared
from jaxrec.errors import UserError

# Sequel of the event one, two or three back; the rest are picks by popularity.
_CHANCES = (0.42, 0.2, 0.1)
_CHANGE_OF_GENRE = 0.15
_SERIES_LENGTHS = ((1, 0.25), (2, 0.2), (3, 0.25), (4, 0.2), (5, 0.1))
_SKEW = 1.1  # popularity of the k-th series of a genre falls as k^-1.1
_GENRE_SKEW = 0.6  # and users who favour the k-th genre as k^-0.6
_PICKS = 8  # draws before a user who has seen them all gets any item that is left
_USERS_AT_ONCE = 50_000  # part of what a seed means: blocks have generators of their own
_FIRST_ITEM_ID = 1001
_FIRST_MOMENT = 1_577_836_800  # 2020-01-01 UTC
_DAY = 86_400


def generate(
    name: str,
    *,
    users: int = 2_000,
    items: int = 500,
    events_per_user: float = 25.0,
    seed: int = 0,
    overwrite: bool = False,
    data_dir: str | os.PathLike[str] | None = None,
) -> Interactions:
    """Writes a generated data set: users who follow series through genres.

    Made for first steps and tests: it needs no network, a sequential model beats popularity on
    it by far, and titles show whether a recommendation makes sense. The same arguments give the
    same set, byte for byte (as long as NumPy's random generators stay as they are).

    Args:
        name: name of the set.
        users: number of users; their ids are 1, 2, ...
        items: size of the catalogue, at least 20; ids are numbers without meaning.
        events_per_user: mean length of a history, at least 3 and at most half the items. Lengths
            vary: a third of it at least, three times it at most.
        seed: another seed gives another catalogue and other users.
        overwrite: replace a set of that name.
        data_dir: folder of the sets; default `jaxrec.data.data_dir()`.

    Returns:
        The set, opened: with times (seconds), ratings (1 to 5 in halves), titles, and the
        columns genre, series and part in `item_table`.

    Raises:
        UserError: where an argument is out of range or the name is taken.

    Cost: O(users * events_per_user^2) comparisons in NumPy; a second for the defaults.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tiny = generate("tiny", users=20, items=40, events_per_user=6, data_dir=folder)
    >>> tiny.num_users, tiny.num_items
    (20, 40)
    """
    _check(users, items, events_per_user)
    target = dataset_dir(name, data_dir)
    check_free(target, overwrite=overwrite)
    catalogue_seed, *user_seeds = np.random.SeedSequence(seed).spawn(
        1 + -(-users // _USERS_AT_ONCE)
    )
    catalogue = _catalogue(items, np.random.default_rng(catalogue_seed))
    parts = []
    for block, block_seed in enumerate(user_seeds):
        count = min(_USERS_AT_ONCE, users - block * _USERS_AT_ONCE)
        part = _histories(count, events_per_user, catalogue, np.random.default_rng(block_seed))
        parts.append((part[0] + block * _USERS_AT_ONCE, *part[1:]))
    user_codes, item_codes, timestamps, ratings = (
        np.concatenate([part[column] for part in parts]) for column in range(4)
    )
    return write_prepared(
        target,
        name=name,
        users=user_codes,
        items=item_codes,
        timestamps=timestamps,
        ratings=ratings,
        user_ids=np.arange(1, users + 1),
        item_ids=np.arange(_FIRST_ITEM_ID, _FIRST_ITEM_ID + items),
        item_table=catalogue.table,
        source={"kind": "generated", "name": "generated"},
        tie_order="by time; events of a user at the same time in the order they were drawn",
        overwrite=overwrite,
        options={
            "users": users,
            "items": items,
            "events_per_user": float(events_per_user),
            "seed": seed,
        },
    )


@dataclass
class _Catalogue:
    """Items by index, in an order that tells nothing.

    Attributes:
        table: title, genre, series, part.
        genre: int[I].
        sequel: int[I], the item that follows each item.
        quality: float[I], what ratings are drawn around.
        by_genre: int[I], items sorted by genre.
        cumulative: float[I + 1], running popularity along `by_genre`.
        bounds: int[G + 1], where each genre begins in `by_genre`.
    """

    table: pa.Table
    genre: np.ndarray
    sequel: np.ndarray
    quality: np.ndarray
    by_genre: np.ndarray
    cumulative: np.ndarray
    bounds: np.ndarray


def _check(users: int, items: int, events_per_user: float) -> None:
    if users < 1:
        raise UserError(f"users is {users}; wanted at least 1")
    if items < 20:
        raise UserError(f"items is {items}; wanted at least 20")
    if not 3 <= events_per_user <= items / 2:
        raise UserError(
            f"events_per_user is {events_per_user:g}; wanted at least 3 and at most half the "
            f"items ({items // 2})"
        )


def _catalogue(items: int, rng: np.random.Generator) -> _Catalogue:
    choices, chances = zip(*_SERIES_LENGTHS, strict=True)
    lengths = rng.choice(choices, size=items, p=chances)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), items)) + 1]
    lengths[-1] -= int(lengths.sum()) - items
    series_count = len(lengths)
    genre_count = min(len(GENRES), max(2, series_count // 5))
    # Every genre has a series, else picks from it would have nothing to choose from.
    series_genre = np.arange(series_count) % genre_count
    starts = np.cumsum(lengths) - lengths
    series = np.repeat(np.arange(series_count), lengths)
    part = np.arange(items) - starts[series] + 1

    sequel = np.arange(1, items + 1)
    companion = _companions(series_genre, rng)
    sequel[starts + lengths - 1] = starts[companion]

    rank = np.arange(series_count) // genre_count + 1
    weight = rank[series] ** -_SKEW * part**-2.0
    quality = rng.normal(3.4, 0.4, series_count)[series] - 0.1 * (part - 1)
    names = _series_names(series_genre, rng)

    shuffled = rng.permutation(items)  # place in the catalogue -> index
    place = np.argsort(shuffled)
    genre = series_genre[series][place]
    by_genre = np.argsort(genre, kind="stable")
    table = pa.table(
        {
            "title": [
                names[s] if lengths[s] == 1 else f"{names[s]}, part {p}"
                for s, p in zip(series[place], part[place], strict=True)
            ],
            "genre": [list(GENRES)[g] for g in genre],
            "series": [names[s] for s in series[place]],
            "part": part[place],
        }
    )
    return _Catalogue(
        table=table,
        genre=genre,
        sequel=shuffled[sequel[place]],
        quality=quality[place],
        by_genre=by_genre,
        cumulative=np.concatenate([[0.0], np.cumsum(weight[place][by_genre])]),
        bounds=np.searchsorted(genre[by_genre], np.arange(genre_count + 1)),
    )


def _companions(series_genre: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each series another one of its genre: one round through each genre."""
    companion = np.empty(len(series_genre), np.int64)
    for genre in range(int(series_genre.max()) + 1):
        tour = rng.permutation(np.flatnonzero(series_genre == genre))
        companion[tour] = np.roll(tour, -1)
    return companion


def _series_names(series_genre: np.ndarray, rng: np.random.Generator) -> list[str]:
    """Distinct names; a number is put behind where the words run out."""
    names = [""] * len(series_genre)
    combinations = len(ADJECTIVES) * len(FORMS)
    for genre, nouns in enumerate(GENRES.values()):
        total = combinations * len(nouns)
        order = rng.permutation(total)
        for count, one in enumerate(np.flatnonzero(series_genre == genre)):
            lap, which = divmod(count, total)
            noun, rest = divmod(int(order[which]), combinations)
            adjective, form = divmod(rest, len(FORMS))
            name = f"{ADJECTIVES[adjective]} {nouns[noun]} {FORMS[form]}"
            names[one] = f"{name} {lap + 1}" if lap else name
    return names


def _histories(
    users: int, mean: float, catalogue: _Catalogue, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """User, item, time and rating of each event, users one after the other."""
    lengths = np.minimum(_lengths(users, mean, rng), len(catalogue.genre))
    longest = int(lengths.max())
    genres = len(catalogue.bounds) - 1
    favours = np.arange(1, genres + 1) ** -_GENRE_SKEW
    favourite = rng.choice(genres, size=users, p=favours / favours.sum())
    genre = favourite.copy()
    taken = np.full((users, longest), -1, np.int64)
    for step in range(longest):
        roams = rng.random(users) < _CHANGE_OF_GENRE
        home = rng.random(users) < 0.5
        genre = np.where(roams, np.where(home, favourite, rng.integers(genres, size=users)), genre)
        taken[:, step] = _next_items(taken[:, :step], genre, catalogue, rng)
        genre = catalogue.genre[taken[:, step]]
    there = np.arange(longest) < lengths[:, None]
    user = np.nonzero(there)[0].astype(np.int32)
    item = taken[there].astype(np.int32)
    times = _times(users, longest, rng)[there]
    liked = 0.8 * (catalogue.genre[item] == favourite[user])
    rating = catalogue.quality[item] + liked + rng.normal(0.0, 0.7, len(item))
    return user, item, times, np.clip(np.rint(rating * 2) / 2, 1, 5).astype(np.float32)


def _lengths(users: int, mean: float, rng: np.random.Generator) -> np.ndarray:
    drawn = np.rint(mean * rng.lognormal(-0.125, 0.5, users))
    return np.clip(drawn, max(3, np.rint(mean / 3)), np.rint(3 * mean)).astype(np.int64)


def _next_items(
    taken: np.ndarray, genre: np.ndarray, catalogue: _Catalogue, rng: np.random.Generator
) -> np.ndarray:
    """The next item of each user, one they have not taken yet."""
    users, steps = taken.shape
    chosen = np.full(users, -1, np.int64)
    drawn = rng.random(users)
    low = 0.0
    for lag, chance in enumerate(_CHANCES, 1):
        if lag <= steps:
            picked = (drawn >= low) & (drawn < low + chance)
            chosen[picked] = catalogue.sequel[taken[picked, -lag]]
        low += chance
    open_ = (chosen < 0) | _seen(taken, chosen)
    for _ in range(_PICKS):
        rows = np.flatnonzero(open_)
        if len(rows) == 0:
            return chosen
        bounds = catalogue.bounds
        start, stop = bounds[genre[rows]], bounds[genre[rows] + 1]
        weight = catalogue.cumulative
        point = weight[start] + rng.random(len(rows)) * (weight[stop] - weight[start])
        place = np.clip(np.searchsorted(weight, point, side="right") - 1, start, stop - 1)
        chosen[rows] = catalogue.by_genre[place]
        open_[rows] = _seen(taken[rows], chosen[rows])
    for row in np.flatnonzero(open_):
        left = np.setdiff1d(np.arange(len(catalogue.genre)), taken[row])
        chosen[row] = rng.choice(left)
    return chosen


def _seen(taken: np.ndarray, items: np.ndarray) -> np.ndarray:
    return (taken == items[:, None]).any(axis=1)


def _times(users: int, longest: int, rng: np.random.Generator) -> np.ndarray:
    """Seconds: sittings of some events, days apart; some events of a sitting share their time."""
    gap = rng.integers(20 * 60, 120 * 60, size=(users, longest))
    new_sitting = rng.random((users, longest)) < 0.3
    days = rng.exponential(12 * _DAY, size=(users, longest)).astype(np.int64)
    gap += np.where(new_sitting, days, 0)
    gap[rng.random((users, longest)) < 0.15] = 0
    start = _FIRST_MOMENT + rng.integers(0, 600 * _DAY, size=(users, 1))
    return start + np.cumsum(gap, axis=1)

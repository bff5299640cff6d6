"""The public data sets that can be prepared: where they are published, under what terms."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from jaxrec.errors import UserError

MOVIELENS_URL = "https://files.grouplens.org/datasets/movielens"
AMAZON_URL = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"


@dataclass(frozen=True)
class Archive:
    """One file as its publisher offers it."""

    filename: str
    size: int | None = None
    """Bytes, where the publisher's file is known."""
    sha256: str | None = None
    """Where the publisher's file is known; a download that differs is refused."""


@dataclass(frozen=True)
class PublicDataset:
    """A public data set: its files, its terms, and the counts its publisher states."""

    name: str
    """What `jaxrec data import tfds:NAME` calls it."""
    title: str
    family: str
    """`movielens` or `amazon-2014`."""
    config: str
    """Name of the configuration of the TFDS builder."""
    base_url: str
    ratings: Archive
    """The archive (MovieLens) or the reviews file (Amazon)."""
    metadata: Archive | None
    """Item metadata, where it is a file of its own."""
    licence: str
    """The terms, in one line."""
    citation: str
    homepage: str
    events: int
    """Ratings or reviews, as the publisher states them."""

    @property
    def url(self) -> str:
        """Address of the ratings."""
        return f"{self.base_url}/{self.ratings.filename}"

    @property
    def size(self) -> int | None:
        """Bytes of the ratings file, where known."""
        return self.ratings.size

    @property
    def notice(self) -> str:
        """What a user reads before a download."""
        return (
            f"{self.title} is not part of jaxrec and comes from {self.homepage}\n"
            f"Terms: {self.licence}\n"
            f"Cite: {self.citation}"
        )

    def archives(self, *, titles: bool = True) -> dict[str, Archive]:
        """The files that are needed, by what they hold: `ratings` and `metadata`."""
        needed = {"ratings": self.ratings}
        if titles and self.metadata is not None:
            needed["metadata"] = self.metadata
        return needed


_MOVIELENS_LICENCE = (
    "research use only; no redistribution and no commercial use without permission; "
    "publications must acknowledge the data set"
)
_MOVIELENS_CITATION = (
    "F. M. Harper and J. A. Konstan. The MovieLens Datasets: History and Context. "
    "ACM Transactions on Interactive Intelligent Systems 5(4):19, 2015"
)
# Sizes and SHA-256 of the four archives: as TensorFlow Datasets registers them for these addresses.
_MOVIELENS = {
    "100k": (
        100_000,
        4_924_029,
        "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
    ),
    "1m": (
        1_000_209,
        5_917_549,
        "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
    ),
    "20m": (
        20_000_263,
        198_702_078,
        "96f243c338a8665f6bcc89c53edf6ee39162a846940de6b7c8c48aeada765ff3",
    ),
    "25m": (
        25_000_095,
        261_978_986,
        "8b21cfb7eb1706b4ec0aac894368d90acf26ebdfb6aced3ebd4ad5bd1eb9c6aa",
    ),
}

_AMAZON_LICENCE = (
    "no licence is stated; the publisher offers it for research and asks for citation; "
    "product text belongs to Amazon and its sellers"
)
_AMAZON_CITATION = (
    "R. He and J. McAuley. Ups and Downs: Modeling the Visual Evolution of Fashion Trends with "
    "One-Class Collaborative Filtering. WWW 2016; J. McAuley et al. Image-Based Recommendations "
    "on Styles and Substitutes. SIGIR 2015"
)
# Category of the 5-core list and its number of reviews, as the publisher's page states them.
_AMAZON = {
    "Amazon_Instant_Video": 37_126,
    "Apps_for_Android": 752_937,
    "Automotive": 20_473,
    "Baby": 160_792,
    "Beauty": 198_502,
    "Books": 8_898_041,
    "CDs_and_Vinyl": 1_097_592,
    "Cell_Phones_and_Accessories": 194_439,
    "Clothing_Shoes_and_Jewelry": 278_677,
    "Digital_Music": 64_706,
    "Electronics": 1_689_188,
    "Grocery_and_Gourmet_Food": 151_254,
    "Health_and_Personal_Care": 346_355,
    "Home_and_Kitchen": 551_682,
    "Kindle_Store": 982_619,
    "Movies_and_TV": 1_697_533,
    "Musical_Instruments": 10_261,
    "Office_Products": 53_258,
    "Patio_Lawn_and_Garden": 13_272,
    "Pet_Supplies": 157_836,
    "Sports_and_Outdoors": 296_337,
    "Tools_and_Home_Improvement": 134_476,
    "Toys_and_Games": 167_597,
    "Video_Games": 231_780,
}


def _movielens(config: str) -> PublicDataset:
    events, size, sha256 = _MOVIELENS[config]
    return PublicDataset(
        name=f"movielens-{config}",
        title=f"MovieLens {config.upper() if config != '100k' else config}",
        family="movielens",
        config=config,
        base_url=MOVIELENS_URL,
        ratings=Archive(f"ml-{config}.zip", size, sha256),
        metadata=None,
        licence=_MOVIELENS_LICENCE,
        citation=_MOVIELENS_CITATION,
        homepage="https://grouplens.org/datasets/movielens/",
        events=events,
    )


def _amazon(category: str) -> PublicDataset:
    return PublicDataset(
        name=f"amazon-2014-{category.lower().replace('_', '-')}",
        title=f"Amazon 2014 {category.replace('_', ' ')} (5-core)",
        family="amazon-2014",
        config=category.lower(),
        base_url=AMAZON_URL,
        ratings=Archive(f"reviews_{category}_5.json.gz"),
        metadata=Archive(f"meta_{category}.json.gz"),
        licence=_AMAZON_LICENCE,
        citation=_AMAZON_CITATION,
        homepage="https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html",
        events=_AMAZON[category],
    )


CATALOGUE: Mapping[str, PublicDataset] = MappingProxyType(
    {entry.name: entry for entry in [*map(_movielens, _MOVIELENS), *map(_amazon, _AMAZON)]}
)

_ALIASES = {
    **{f"ml-{config}": f"movielens-{config}" for config in _MOVIELENS},
    "amazon-2014-sports": "amazon-2014-sports-and-outdoors",
    "amazon-2014-toys": "amazon-2014-toys-and-games",
}


def available() -> list[PublicDataset]:
    """The public data sets that `prepare` knows, in a fixed order.

    Returns:
        One entry a set, with `name`, `title`, `events`, `url`, `size` (bytes, or None where the
        publisher's file is not known to the byte), `licence`, `citation` and `homepage`.

    >>> [entry.name for entry in available()][:2]
    ['movielens-100k', 'movielens-1m']
    >>> available()[1].size
    5917549
    """
    return list(CATALOGUE.values())


def find(name: str) -> PublicDataset:
    """The entry of one public data set.

    Args:
        name: as in `available`; `tfds:` before it, underscores and capitals do not matter.

    Raises:
        UserError: for a set that is not in the list.

    >>> find("tfds:Amazon-2014-Toys").ratings.filename
    'reviews_Toys_and_Games_5.json.gz'
    """
    plain = str(name).strip().lower().removeprefix("tfds:").replace("_", "-")
    found = CATALOGUE.get(_ALIASES.get(plain, plain))
    if found is not None:
        return found
    near = difflib.get_close_matches(plain, [*CATALOGUE, *_ALIASES], n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else "see `jaxrec data list`"
    families = "movielens-{100k,1m,20m,25m} and amazon-2014-CATEGORY"
    raise UserError(f"{name!r} is not a public data set that jaxrec knows ({families}); {hint}")


def at(entry: PublicDataset, base_url: str | None) -> PublicDataset:
    """The same set, fetched from a mirror: the same file names below another address.

    Raises:
        UserError: where the address is not an http or https one.
    """
    if base_url is None:
        return entry
    if not base_url.startswith(("http://", "https://")):
        raise UserError(f"{base_url!r} is not an address of a mirror: begin with https://")
    return dataclasses.replace(entry, base_url=base_url.rstrip("/"))


Notice = Callable[[str], None]

"""Named shapes that tests, the choice of block sizes and benchmarks share.

They are those of recommenders: histories of 50 to 200 events and widths of 64, some longer ones,
and catalogues from MovieLens-1M's to ten million items.
"""

from typing import NamedTuple


class AttentionShape(NamedTuple):
    """Queries, keys and values are `[batch, length, heads, head_dim]`."""

    batch: int
    length: int
    heads: int
    head_dim: int


class CatalogueShape(NamedTuple):
    """Hidden states are `[positions, width]`, the item table is `[items, width]`."""

    positions: int
    items: int
    width: int


ATTENTION: dict[str, AttentionShape] = {
    "n50": AttentionShape(128, 50, 1, 64),
    "n200": AttentionShape(128, 200, 1, 64),
    "n200-heads": AttentionShape(32, 200, 4, 32),
    "n1024": AttentionShape(16, 1024, 4, 64),
    "n8192": AttentionShape(4, 8192, 8, 128),
}

CATALOGUE: dict[str, CatalogueShape] = {
    "v3k": CatalogueShape(25_600, 3_416, 64),
    "v100k": CatalogueShape(25_600, 100_000, 64),
    "v1m": CatalogueShape(25_600, 1_000_000, 64),
    "v10m": CatalogueShape(25_600, 10_000_000, 64),
}

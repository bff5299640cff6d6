"""Public data sets, through TFDS builders of our own and without TensorFlow.

`available` lists them, `prepare` makes one ready for training, `builder` gives the TFDS builder
itself. Importing this package does not import TFDS; preparing a set does.
"""

from typing import Any

from jaxrec.data.tfds.catalogue import Archive, PublicDataset, at, available, find
from jaxrec.data.tfds.prepare import prepare

__all__ = ["Archive", "PublicDataset", "available", "builder", "find", "prepare"]


def builder(dataset: str, *, base_url: str | None = None, **options: Any) -> Any:
    """The TFDS builder of a public data set, for those who want TFDS's own interface.

    Args:
        dataset: as in `available`.
        base_url: a mirror, with the same file names as the publisher.
        **options: `archives` (a mapping of `ratings` and `metadata` to files at hand, in place of a
            download), `titles`, and what every TFDS builder takes (`data_dir`).

    Returns:
        A `tfds.core.GeneratorBasedBuilder`. Prepare it with
        `download_and_prepare(file_format="array_record")` and read it with `as_data_source()`;
        a record holds 65,536 rows as columns.

    Raises:
        UserError: for a set that is not known.
    """
    from jaxrec.data.tfds.builders import make_builder

    return make_builder(at(find(dataset), base_url), **options)

"""A run as a folder that is ranked from without the model's code (see `serving.artifact`)."""

import secrets
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
from jax import Array
from jax.errors import InconclusiveDimensionOperation

from jaxrec import ops
from jaxrec._json_files import write_json
from jaxrec.errors import UserError
from jaxrec.serving.artifact import (
    FORMAT,
    ITEMS,
    MANIFEST,
    PLATFORMS,
    Manifest,
    describe_file,
    function_name,
    parameter_name,
)
from jaxrec.training.setup import count_from_newest

if TYPE_CHECKING:
    from jaxrec.serving.run import Run

# `top_k_items` looks at so many seen items together.
_SEEN_MULTIPLE = 128
# Items scored at once for every history of a batch whose size is not known.
_ITEM_BLOCK = 1 << 16


def write_artifact(
    run: "Run",
    folder: str | Path,
    *,
    platforms: Sequence[str] = PLATFORMS,
    k: int = 10,
    batch_size: int | None = None,
) -> Path:
    """Exports a run; see `Run.export`.

    The function of each platform is
    (parameters, items int32[batch, max_length], lengths int32[batch], timestamps int32[batch,
    max_length] if the model reads them, seen int32[batch, columns]) -> (scores float32[batch, k],
    items int32[batch, k]). A history stands at the beginning of its row, oldest event first;
    timestamps are seconds since its first event; seen items are left out, and -1 is padding there.
    Best first; -inf and -1 where there are fewer than k candidates, and for a length of 0.
    """
    folder = Path(folder).expanduser().absolute()
    _check(folder, platforms, k, batch_size)
    functions = {
        platform: _serialized(run, platform, min(k, run.num_items), batch_size)
        for platform in platforms
    }
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    try:
        (temporary / "parameters").mkdir(parents=True)
        manifest = _write_files(run, temporary, functions, min(k, run.num_items), batch_size)
        write_json(temporary / MANIFEST, manifest.as_json())
        temporary.replace(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _check(folder: Path, platforms: Sequence[str], k: int, batch_size: int | None) -> None:
    known = ", ".join(PLATFORMS)
    if isinstance(platforms, str) or not platforms:
        raise UserError(f"export: platforms is a list out of {known}, got {platforms!r}")
    for platform in platforms:
        if platform not in PLATFORMS:
            raise UserError(f"export: unknown platform {platform!r}; known: {known}")
    if len(set(platforms)) != len(platforms):
        raise UserError(f"export: a platform stands twice in {', '.join(platforms)}")
    if k < 1:
        raise UserError(f"export: k must be at least 1, got {k}")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"export: batch_size must be at least 1, got {batch_size}")
    if not folder.parent.is_dir():
        raise UserError(f"{folder.parent}: no such folder to export into")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: is in use; export into a new folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; export into a new folder")


def _serialized(run: "Run", platform: str, k: int, batch_size: int | None) -> bytes:
    """The function, lowered for a platform that need not be here."""
    scope = jax.export.SymbolicScope()
    (columns,) = jax.export.symbolic_shape(f"{_SEEN_MULTIPLE}*n", scope=scope)
    batch: Any = batch_size
    if batch is None:
        (batch,) = jax.export.symbolic_shape("batch", scope=scope)
    sizes = {"batch": batch, "seen": columns}
    inputs = [
        jax.ShapeDtypeStruct([sizes.get(size, size) for size in one["shape"]], one["dtype"])
        for one in _inputs(run, "batch", "seen")
    ]
    parameters = run.parameter_shapes()
    function = jax.jit(_function(run, k, by_row=batch_size is None))
    try:
        exported = jax.export.export(function, platforms=[platform])(parameters, *inputs)
    except InconclusiveDimensionOperation as error:
        if batch_size is not None:
            raise
        raise UserError(
            f"export: the model cannot be exported for any batch size ({error}); give one "
            "(--batch-size 64)"
        ) from None
    return bytes(exported.serialize())


def _inputs(run: "Run", batch: Any, seen: Any) -> list[dict[str, Any]]:
    length = run.config.data.max_length
    shapes = {"items": [batch, length], "lengths": [batch]}
    if run.config.model.reads_timestamps:
        shapes["timestamps"] = [batch, length]
    shapes["seen"] = [batch, seen]
    return [{"name": name, "shape": shape, "dtype": "int32"} for name, shape in shapes.items()]


def _function(run: "Run", k: int, *, by_row: bool) -> Callable[..., Any]:
    """What is exported; `by_row`: each history by itself, so that no op sees the batch's size."""
    bind, max_length = run.bind, run.config.data.max_length
    from_newest = count_from_newest(run.config)
    reads_timestamps = run.config.model.reads_timestamps

    def rank(
        model: Any, items: Array, lengths: Array, *rest: Array, **options: Any
    ) -> tuple[Array, Array]:
        slots = jnp.arange(max_length, dtype=jnp.int32)[None]
        lengths = lengths[:, None]
        valid = slots < lengths
        positions = lengths - 1 - slots if from_newest else jnp.broadcast_to(slots, items.shape)
        times = {"timestamps": jnp.where(valid, rest[0], 0)} if reads_timestamps else {}
        states = model.hidden(
            jnp.where(valid, items, 0),
            valid=valid,
            segment_ids=valid.astype(jnp.int32),
            positions=jnp.where(valid, positions, 0),
            **times,
        )
        last = jnp.maximum(lengths - 1, 0)
        state = jnp.take_along_axis(states, last[..., None], axis=1)[:, 0]
        table = model.item_table()
        scores, best = ops.top_k_items(
            state.astype(jnp.promote_types(state.dtype, table.dtype)),
            table,
            k,
            exclude=rest[-1],
            **options,
        )
        return (
            jnp.where(lengths > 0, scores, jnp.float32(-jnp.inf)),
            jnp.where(lengths > 0, best, -1),
        )

    def whole(parameters: dict[str, Array], *inputs: Array) -> tuple[Array, Array]:
        model = bind(parameters)
        if not by_row:
            return rank(model, *inputs)

        def one(*inputs: Array) -> tuple[Array, Array]:
            scores, best = rank(model, *(x[None] for x in inputs), item_block=_ITEM_BLOCK)
            return scores[0], best[0]

        return jax.vmap(one)(*inputs)

    return whole


def _write_files(
    run: "Run", folder: Path, functions: dict[str, bytes], k: int, batch_size: int | None
) -> Manifest:
    import jaxrec

    names = [ITEMS]
    table = run.item_table
    pq.write_table(
        table.select([name for name in ("item_id", "title") if name in table.column_names]),
        folder / ITEMS,
    )
    for platform, content in functions.items():
        names.append(function_name(platform))
        (folder / names[-1]).write_bytes(content)
    for name in run.parameters:
        names.append(parameter_name(name))
        array = run.host_parameter(name)
        # NumPy's files do not know bfloat16; the manifest says what the bits are.
        raw = array.view(f"uint{8 * array.itemsize}") if array.dtype.kind == "V" else array
        np.save(folder / names[-1], raw, allow_pickle=False)
    data = run.folder.read_data()
    batch: int | str = "batch" if batch_size is None else batch_size
    return Manifest(
        format=FORMAT,
        model=run.config.model.type,
        data={key: data[key] for key in ("name", "hash", "items")},
        step=run.step,
        max_length=run.config.data.max_length,
        k=k,
        batch_size=batch_size,
        seen_multiple=_SEEN_MULTIPLE,
        filter_seen=run.config.evaluation.filter_seen,
        parameters={
            name: {"shape": list(value.shape), "dtype": value.dtype.name}
            for name, value in run.parameter_shapes().items()
        },
        inputs=_inputs(run, batch, "seen"),
        outputs=[
            {"name": "scores", "shape": [batch, k], "dtype": "float32"},
            {"name": "items", "shape": [batch, k], "dtype": "int32"},
        ],
        platforms=list(functions),
        jax=jax.__version__,
        jaxrec=jaxrec.__version__,
        files={name: describe_file(folder / name) for name in names},
    )

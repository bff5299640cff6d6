"""What is compiled and timed: each op on each of its named shapes, forward or with its gradient."""

from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.costs import COSTS, Cost
from jaxrec import ops
from jaxrec.ops._attention_core import block_for
from jaxrec.ops._dispatch import Decision, recorded
from jaxrec_kernels import shapes
from jaxrec_kernels.shapes import AttentionShape, CatalogueShape

TIME_BUCKETS = 128


class Case(NamedTuple):
    """One program: an op, a shape, and whether the gradient by all float arguments is taken.

    `rows` stands for the shape's own number of sequences or positions, where those are too many.
    """

    op: str
    shape: str
    backward: bool
    rows: int | None = None

    @property
    def direction(self) -> str:
        return "forward+backward" if self.backward else "forward"

    @property
    def size(self) -> AttentionShape | CatalogueShape:
        """The numbers that are computed with."""
        named = self.named_size
        return named if self.rows is None else named._replace(**{named._fields[0]: self.rows})

    @property
    def named_size(self) -> AttentionShape | CatalogueShape:
        """The numbers behind the shape's name."""
        return _OPS[self.op].shapes[self.shape]

    @property
    def layouts_are_free(self) -> bool:
        """Whether its arrays come from layers and go to layers, in whatever layout suits them.

        Those of attention do; a catalogue's table lies as the runtime puts it.
        """
        return isinstance(self.size, AttentionShape)

    @property
    def block_rounds(self) -> float | None:
        """Mean rounds of the loops of XLA's form over the blocks that a block of a row meets.

        A row is one sequence here; with several, blocks that share none are skipped. None where
        rows are not cut into blocks.
        """
        block = block_for(self.size.length) if isinstance(self.size, AttentionShape) else None
        return None if block is None else (-(-self.size.length // block) + 1) / 2

    def cost(self, itemsize: int) -> Cost:
        """FLOPs and bytes, counted by hand."""
        return COSTS[self.op](self.size, self.backward, itemsize)


class Program(NamedTuple):
    """A function of arrays, and the shapes and dtypes it is called with."""

    function: Callable[..., Any]
    specs: tuple[jax.ShapeDtypeStruct, ...]


class _Op(NamedTuple):
    shapes: dict[str, Any]
    # (shape, dtype, implementation) -> (f(*floats, *others), specs of floats, specs of others)
    build: Callable[..., Any]


def cases(
    names: tuple[str, ...] = (),
    shape_names: tuple[str, ...] = (),
    directions: tuple[str, ...] = (),
) -> Iterator[Case]:
    """All cases of these ops, shapes and directions; no name means all of them."""
    for op, description in _OPS.items():
        for shape in description.shapes:
            for backward in (False, True):
                case = Case(op, shape, backward)
                if (
                    (not names or op in names)
                    and (not shape_names or shape in shape_names)
                    and (not directions or case.direction in directions)
                ):
                    yield case


def program(
    case: Case,
    dtype: Any,
    implementation: str | None,
    instead: Callable[..., Any] | None = None,
) -> Program:
    """The function of a case, and its arguments' shapes.

    Queries, keys, values and the output are `[batch, length, heads * head_dim]`, as the products
    before and behind the op have them: narrow heads in an array of their own would be filled up to
    whole registers, and moving that would be what is measured.

    Args:
      case: the op, its shape and its direction.
      dtype: of the float arguments.
      implementation: what the op is told.
      instead: another function of the op's arguments, computed in its place.
    """
    op, floats, others = _OPS[case.op].build(case.size, dtype, implementation)
    op = op if instead is None else instead
    wanted = (*floats, *others)

    def f(*arguments: jax.Array) -> jax.Array:
        pairs = zip(arguments, wanted, strict=True)
        found: jax.Array = op(*(x.reshape(spec.shape) for x, spec in pairs))
        return found.reshape(_beside(found.shape))

    specs = tuple(jax.ShapeDtypeStruct(_beside(spec.shape), spec.dtype) for spec in wanted)
    if not case.backward:
        return Program(f, specs)

    def total(*arguments: jax.Array) -> jax.Array:
        # A square, so that every element has a cotangent of its own.
        return (f(*arguments).astype(jnp.float32) ** 2).sum()

    return Program(jax.grad(total, tuple(range(len(floats)))), specs)


def _beside(shape: tuple[int, ...]) -> tuple[int, ...]:
    """With heads side by side, where there are some."""
    return (*shape[:2], shape[2] * shape[3]) if len(shape) == 4 else shape


def argument_names(case: Case, dtype: Any) -> tuple[str, ...]:
    """What the arguments of the case's function are, in their order."""
    return tuple(signature(_OPS[case.op].build(case.size, dtype, None)[0]).parameters)


def kernel_missing(case: Case, dtype: Any, platform: str = "tpu") -> str | None:
    """Why no Pallas kernel takes the case on a platform, or None if one does.

    One that is left to those who ask for it takes it too.
    """

    def decide(implementation: str | None) -> Decision:
        forward = program(case._replace(backward=False), dtype, implementation)
        with recorded() as decisions:
            jax.eval_shape(forward.function, *forward.specs)
        return next(d for d in decisions if d.choice.op == case.op)

    choice, platforms, _ = decide(None)
    if choice.implementation != "pallas":
        try:
            decide("pallas")
        except ValueError:
            return choice.reason
    return None if platform in platforms else f"the kernel is for {', '.join(platforms)}"


def op_names() -> tuple[str, ...]:
    return tuple(_OPS)


def shape_names() -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for op in _OPS.values() for name in op.shapes))


def _causal_attention(shape: AttentionShape, dtype: Any, implementation: str | None) -> Any:
    def f(query: Any, key: Any, value: Any, ids: Any) -> Any:
        return ops.causal_attention(
            query, key, value, valid=ids > 0, segment_ids=ids, implementation=implementation
        )

    x, ids = _rows(shape, dtype)
    return f, (x, x, x), (ids,)


def _positional_kernel_attention(
    shape: AttentionShape, dtype: Any, implementation: str | None
) -> Any:
    def f(query: Any, key: Any, value: Any, logits: Any, values: Any, ids: Any) -> Any:
        return ops.positional_kernel_attention(
            query,
            key,
            value,
            logits,
            values,
            structure="toeplitz",
            valid=ids > 0,
            segment_ids=ids,
            implementation=implementation,
        )

    x, ids = _rows(shape, dtype)
    taps = jax.ShapeDtypeStruct((shape.length,), jnp.float32)
    return f, (x, x, x, taps, taps), (ids,)


def _hstu_attention(shape: AttentionShape, dtype: Any, implementation: str | None) -> Any:
    def f(query: Any, key: Any, value: Any, places: Any, times: Any, seconds: Any, ids: Any) -> Any:
        return ops.hstu_attention(
            query,
            key,
            value,
            normalizer=shape.length,
            position_table=places,
            time_table=times,
            timestamps=seconds,
            valid=ids > 0,
            segment_ids=ids,
            implementation=implementation,
        )

    x, ids = _rows(shape, dtype)
    places = jax.ShapeDtypeStruct((2 * shape.length - 1,), jnp.float32)
    times = jax.ShapeDtypeStruct((TIME_BUCKETS + 1,), jnp.float32)
    return f, (x, x, x, places, times), (ids, ids)


def _rows(shape: AttentionShape, dtype: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (
        jax.ShapeDtypeStruct(tuple(shape), dtype),
        jax.ShapeDtypeStruct((shape.batch, shape.length), jnp.int32),
    )


def _linear_cross_entropy(shape: CatalogueShape, dtype: Any, implementation: str | None) -> Any:
    return _loss(ops.linear_cross_entropy, shape, dtype, implementation)


def _mean_linear_cross_entropy(
    shape: CatalogueShape, dtype: Any, implementation: str | None
) -> Any:
    return _loss(ops.mean_linear_cross_entropy, shape, dtype, implementation)


def _loss(op: Any, shape: CatalogueShape, dtype: Any, implementation: str | None) -> Any:
    def f(hidden: Any, item_table: Any, labels: Any) -> Any:
        return op(hidden, item_table, labels, implementation=implementation)

    hidden = jax.ShapeDtypeStruct((shape.positions, shape.width), dtype)
    table = jax.ShapeDtypeStruct((shape.items, shape.width), dtype)
    return f, (hidden, table), (jax.ShapeDtypeStruct((shape.positions,), jnp.int32),)


_OPS: dict[str, _Op] = {
    "linear_cross_entropy": _Op(shapes.CATALOGUE, _linear_cross_entropy),
    "mean_linear_cross_entropy": _Op(shapes.CATALOGUE, _mean_linear_cross_entropy),
    "causal_attention": _Op(shapes.ATTENTION, _causal_attention),
    "positional_kernel_attention": _Op(shapes.ATTENTION, _positional_kernel_attention),
    "hstu_attention": _Op(shapes.ATTENTION, _hstu_attention),
}

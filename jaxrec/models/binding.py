"""An NNX model as a flat table of named arrays plus a function that puts it together again.

Training, checkpoints and error messages all use the flat names (`blocks.0.query.kernel`), so a
checkpoint can be read without the model's code and a bad parameter can be named.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import Array

from jaxrec.errors import UserError
from jaxrec.models.config import ModelConfig
from jaxrec.registry import resolve

Parameters = dict[str, Array]


def build_model(
    config: ModelConfig, *, num_items: int, max_length: int, seed: int | Array
) -> nnx.Module:
    """A freshly initialised model.

    Args:
      config: names and numbers.
      num_items: items of the catalogue.
      max_length: longest sequence.
      seed: of the parameters; or the key `jax.random.key(seed)`, which may be traced.
    """
    model_class = resolve("model", config.type)
    model: nnx.Module = model_class(
        config, num_items=num_items, max_length=max_length, rngs=nnx.Rngs(seed)
    )
    return model


def split_model(model: nnx.Module) -> tuple[Parameters, Callable[[Parameters], Any]]:
    """The model's parameters by dotted name, and the inverse.

    Returns:
      (parameters, bind), where `bind(parameters)` is the model with these parameters; it may be
      called under jit, grad or vmap.
    """
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    paths = [path for path, _ in flat]
    names = [".".join(map(str, path)) for path in paths]
    parameters = {name: v.get_value() for name, (_, v) in zip(names, flat, strict=True)}
    # What `bind` keeps are kinds of variables: the arrays would live as long as it does.
    variables = [v.replace(jax.ShapeDtypeStruct(v.shape, v.dtype)) for _, v in flat]

    def bind(parameters: Parameters) -> Any:
        if set(parameters) != set(names):
            missing = sorted(set(names) - set(parameters))
            unknown = sorted(set(parameters) - set(names))
            raise UserError(
                f"parameters of another model: missing {missing[:3]}, unknown {unknown[:3]}"
            )
        leaves = [v.replace(parameters[n]) for n, v in zip(names, variables, strict=True)]
        return nnx.merge(graph, nnx.from_flat_state(zip(paths, leaves, strict=True)))

    return parameters, bind

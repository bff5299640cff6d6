"""A model as a flat table of named arrays, and back."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.errors import UserError
from jaxrec.models.binding import build_model, split_model
from jaxrec.models.config import PositionalKernelConfig, SASRecConfig

CONFIG = SASRecConfig(width=4, blocks=2, dropout=0.0)


def split(config=CONFIG):
    return split_model(build_model(config, num_items=5, max_length=3, seed=0))


def test_names_tell_where_a_parameter_belongs():
    parameters, _ = split()
    per_block = [
        f"{layer}.{part}"
        for layer in ("query", "key", "value", "output", "expand", "contract")
        for part in ("kernel", "bias")
    ] + [f"{n}.{p}" for n in ("attention_norm", "feed_forward_norm") for p in ("scale", "bias")]
    wanted = {"item_embedding", "position_embedding", "norm.scale", "norm.bias"}
    wanted |= {f"blocks.{b}.{name}" for b in (0, 1) for name in per_block}
    assert set(parameters) == wanted
    assert parameters["blocks.1.query.kernel"].shape == (4, 4)
    assert all(isinstance(value, jax.Array) for value in parameters.values())


def test_the_model_has_the_parameters_it_was_bound_to():
    parameters, bind = split()
    changed = {name: value + 1 for name, value in parameters.items()}
    model = bind(changed)
    np.testing.assert_array_equal(model.item_embedding[...], changed["item_embedding"])
    np.testing.assert_array_equal(
        model.blocks[1].query.kernel[...], changed["blocks.1.query.kernel"]
    )
    again, _ = split_model(model)
    assert again.keys() == changed.keys()
    for name in changed:
        np.testing.assert_array_equal(again[name], changed[name])


def test_binding_one_leaves_the_other_as_it_was():
    parameters, bind = split()
    one = bind(parameters)
    bind({name: value * 0 for name, value in parameters.items()})
    np.testing.assert_array_equal(one.item_embedding[...], parameters["item_embedding"])


def test_what_binds_keeps_no_arrays():
    """A table would lie in memory as long as a run is trained or served."""
    width = 97
    model = build_model(SASRecConfig(width=width), num_items=5, max_length=3, seed=0)
    parameters, bind = split_model(model)
    shapes = {name: value.shape for name, value in parameters.items()}
    del model, parameters
    gc.collect()
    assert not [x for x in jax.live_arrays() if x.shape == (5, width)]
    bound = bind({name: jnp.ones(shape) for name, shape in shapes.items()})
    assert bound.item_embedding[...].shape == (5, width)


def test_a_model_is_called_for_its_hidden_states():
    model = build_model(CONFIG, num_items=5, max_length=3, seed=0)
    items = jnp.array([[1, 2, 0]])
    slots = {"valid": items > 0, "segment_ids": items * 0, "positions": jnp.array([[0, 1, 2]])}
    np.testing.assert_array_equal(model(items, **slots), model.hidden(items, **slots))


def test_binding_works_under_transformations():
    parameters, bind = split()

    @jax.jit
    def total(parameters):
        return jnp.sum(bind(parameters).item_table() ** 2)

    gradients = jax.grad(total)(parameters)
    np.testing.assert_allclose(
        gradients["item_embedding"], 2 * parameters["item_embedding"], rtol=1e-6
    )
    assert not np.asarray(gradients["norm.scale"]).any()
    stacked = jax.tree.map(lambda value: jnp.stack([value, 2 * value]), parameters)
    np.testing.assert_allclose(
        jax.vmap(total)(stacked), [total(parameters), 4 * total(parameters)], rtol=1e-6
    )


def test_a_shared_kernel_is_one_parameter_for_all_blocks():
    config = SASRecConfig(
        width=4, blocks=3, position="kernel", kernel=PositionalKernelConfig(shared=True)
    )
    parameters, bind = split(config)
    assert [n for n in parameters if n.endswith("kernel.logits")] == ["blocks.0.kernel.logits"]
    model = bind(parameters | {"blocks.0.kernel.logits": jnp.array([1.0, 2.0, 3.0])})
    for block in model.blocks:
        np.testing.assert_array_equal(block.kernel.logits[...], [1.0, 2.0, 3.0])


def test_parameters_of_another_model_are_refused_by_name():
    parameters, bind = split()
    with pytest.raises(UserError, match=r"missing \['norm.scale'\]"):
        bind({name: value for name, value in parameters.items() if name != "norm.scale"})
    with pytest.raises(UserError, match=r"unknown \['blocks.7.x'\]"):
        bind(parameters | {"blocks.7.x": jnp.ones(1)})


def test_an_unknown_model_is_refused_with_those_known():
    class Other(SASRecConfig):
        type = "sasrek"

    with pytest.raises(UserError, match="unknown model 'sasrek'; known: esasrec, hstu, sasrec"):
        build_model(Other(), num_items=5, max_length=3, seed=0)

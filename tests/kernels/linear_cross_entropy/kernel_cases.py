"""The catalogue loss with its Pallas kernels interpreted on the CPU."""

import contextlib
from functools import partial

import jax

from jaxrec.ops import _dispatch
from jaxrec_kernels.linear_cross_entropy import tiling, tpu_backward, tpu_forward
from jaxrec_kernels.linear_cross_entropy.tiling import Blocks

# Two or three blocks along both axes, the last ones ragged, two chunks a block.
SMALL = Blocks(positions=128, items=256, chunk=128)
# These tests compile far more than they compute.
QUICK = {"xla_backend_optimization_level": 0}


@contextlib.contextmanager
def interpreted(monkeypatch, blocks=SMALL, interpret=True):
    """Runs the TPU's branch of ops that are traced inside, whatever the platform."""
    with monkeypatch.context() as patch:
        patch.setattr(tiling, "slower", lambda *_: None)
        for module, name in ((tpu_forward, "statistics"), (tpu_backward, "table_gradient")):
            kernel = partial(getattr(module, name), blocks=blocks, interpret=interpret)
            patch.setattr(module, name, kernel)
        patch.setattr(_dispatch, "platform_switch", lambda xla, kernels, *x: kernels["tpu"](*x))
        yield


def run(f, *arguments):
    return jax.jit(lambda *a: f(*a), compiler_options=QUICK)(*arguments)

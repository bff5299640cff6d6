"""Test settings: CPU with eight virtual devices, strict dtype and rank promotion."""

import os
import signal

from quick_compiler import QUICKEST, as_flags

# Before JAX starts. The TPU compiler is used ahead of time only, never as a device.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# Most of the tests' time is LLVM's, on programs that run once; XLA's own passes are as always. What
# a test runs as a user would has no such flags.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        *as_flags(QUICKEST),
    ]
).strip()

import jax
import numpy as np
import pytest

# A shell that starts the tests in the background has them ignore Ctrl-C; some send themselves one.
signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)

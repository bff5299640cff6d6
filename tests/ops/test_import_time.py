"""`import jaxrec.ops` loads JAX and next to nothing else."""

import json
import statistics
import subprocess
import sys

import pytest

HEAVY = ["flax", "optax", "orbax", "grain", "tensorflow_datasets", "tensorflow", "pyarrow", "chex"]


def python(code):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return result.stdout


@pytest.mark.parametrize("module", ["jaxrec", "jaxrec.ops"])
def test_nothing_heavy_is_imported(module):
    code = f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))"
    loaded = {name.split(".")[0] for name in json.loads(python(code))}
    assert "jaxrec" in loaded
    assert not loaded & set(HEAVY)


def test_ops_import_nothing_of_jaxrec_but_ops():
    code = "import sys, json, jaxrec.ops; print(json.dumps(sorted(sys.modules)))"
    ours = {name for name in json.loads(python(code)) if name.split(".")[0] == "jaxrec"}
    assert ours
    assert all(name in ("jaxrec", "jaxrec.ops") or name.startswith("jaxrec.ops.") for name in ours)


def test_import_costs_little_more_than_jax():
    """CPU seconds after `import jax`, in one process: steady on a busy machine."""
    code = (
        "import time, jax, jax.numpy; begin = time.process_time(); import jaxrec.ops; "
        "print(time.process_time() - begin)"
    )
    assert statistics.median(float(python(code)) for _ in range(3)) < 0.2


def test_no_device_is_touched_by_the_import():
    """A backend that starts while importing would take seconds and pick a device too early."""
    code = (
        "import jaxrec.ops; from jax._src import xla_bridge; "
        "print(xla_bridge.backends_are_initialized())"
    )
    assert python(code).strip() == "False"

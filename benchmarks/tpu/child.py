"""A benchmark module run on one JSON description in a process of its own.

The TPU compiler reads its flags once, when it starts, and a program that is too large for this
machine should take no other down with it.
"""

import json
import os
import subprocess
import sys
from typing import Any

_SECONDS = 3600


def in_a_process(module: str, spec: dict[str, Any]) -> dict[str, Any]:
    """The JSON object on the last line that `python -m MODULE SPEC` prints, or `error`."""
    command = [sys.executable, "-m", module, json.dumps(spec)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    # Without these a compile looks for a TPU on the network, and two processes exclude each other.
    environment.setdefault("TPU_SKIP_MDS_QUERY", "1")
    environment.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not compiled within {_SECONDS} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return {"error": said[-1] if said else f"ended with code {done.returncode}"}
    return json.loads(lines[-1])

"""Chips to compile for, on a machine that has none."""

import functools
from typing import Any

import pytest
from jax.experimental import topologies

pytest.importorskip("libtpu")


@functools.cache
def devices(chip: str) -> Any:
    """Four of them, two by two: `"v5e"`, `"v6e"`."""
    return topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:2x2").devices

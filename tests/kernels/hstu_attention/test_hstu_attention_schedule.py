"""What the TPU compiler's schedules of the kernels promise."""

import pytest

from benchmarks.tpu.child import in_a_process

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_nothing_is_spilled_where_heads_share_registers(chip):
    """Of the named shapes this one has been the first to spill."""
    found = in_a_process(
        "benchmarks.tpu.measure",
        {
            "op": "hstu_attention",
            "shape": "n200-heads",
            "backward": True,
            "dtype": "bfloat16",
            "implementation": "pallas",
            "chip": chip,
        },
    )
    assert found["spills"] == 0

"""Pallas kernels behind `jaxrec.ops`: one folder each; its `tpu*.py` is what the op calls."""

# Of a TPU's registers, along the last axis of an array.
LANES = 128

"""Pallas kernels behind `jaxrec.ops`: one folder an op, one file a backend."""

# Of a TPU's registers, along the last axis of an array.
LANES = 128

"""Pallas kernels behind `jaxrec.ops`: one folder an op, one file a backend."""

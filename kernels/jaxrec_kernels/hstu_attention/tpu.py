"""Pointwise attention of HSTU on TPU."""

from jaxrec_kernels.hstu_attention.backward import backward
from jaxrec_kernels.hstu_attention.forward import forward

__all__ = ["backward", "forward"]

"""Which TPUs the kernels are made for."""

from jaxrec_kernels.tuning import device_kind

# As devices name themselves.
V5E, V6E = ("TPU v5 lite", "TPU v5e"), ("TPU v6 lite", "TPU v6e")
# 16 MiB of VMEM, where rows of 1,024 events take 28; and no rotation of rows by their number.
_OLDER = ("TPU v2", "TPU v3", "TPU v4", "TPU v4 lite")


def older_than_v5() -> str | None:
    """Why kernels are left to those who ask for them on the TPU that is compiled for, or None.

    Where nothing says which TPU that is (see `tuning.device_kind`), it is taken for a later one.
    """
    kind = device_kind()
    if kind not in _OLDER:
        return None
    return f"the kernels are made for v5e and later TPUs, and this is a {kind}"

"""Compiler options for tests that compile far more than they compute."""

from importlib.metadata import version

QUICKEST: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
if tuple(int(n) for n in version("jax").split(".")[:2]) < (0, 11):
    # A third of the time; later versions have one kind of emitter.
    QUICKEST["xla_cpu_use_fusion_emitters"] = False


def as_flags(options: dict[str, int | bool]) -> list[str]:
    """For `XLA_FLAGS`."""
    return [f"--{name}={value}".lower() for name, value in options.items()]

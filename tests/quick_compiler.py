"""Compiler options for tests that compile far more than they compute."""

import jax

QUICKEST: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    # A third of the time; later versions have one kind of emitter.
    QUICKEST["xla_cpu_use_fusion_emitters"] = False

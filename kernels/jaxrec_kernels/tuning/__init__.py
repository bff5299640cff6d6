"""Block sizes measured beforehand, one JSON file a kind of TPU, for kernels to look up.

Every kernel has a rule that gives block sizes for any call: a cost model in its own folder. A table
only says where something else was seen to be better, and by how much. `python -m benchmarks.tune`
writes the files.
"""

from jaxrec_kernels.tuning.lookup import looked_up, tuned, using
from jaxrec_kernels.tuning.target import compiling_for, device_kind

__all__ = ["compiling_for", "device_kind", "looked_up", "tuned", "using"]

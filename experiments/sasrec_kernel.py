"""SASRec whose position is a learned kernel in attention, instead of vectors at the input.

    jaxrec train experiments/sasrec_kernel.py --data NAME --out runs/sasrec_kernel

Everything but the position scheme is as in `sasrec.py`: Toeplitz factors of full length on the
logits and on the values, one pair a block, starting at the identity.
"""

from dataclasses import replace
from pathlib import Path
from runpy import run_path

base = run_path(str(Path(__file__).with_name("sasrec.py")))["config"]

config = replace(
    base,
    name="sasrec_kernel",
    model=replace(base.model, position="kernel"),
)

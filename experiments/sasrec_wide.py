"""SASRec with full cross-entropy, 256 wide and three blocks deep: the best of a published grid.

    jaxrec train experiments/sasrec_wide.py --data NAME --out runs/sasrec_wide

All else is as in `sasrec.py`. On both sets Gusak et al. found this configuration to be the best of
their 108 by validation. On one CPU core an epoch of Beauty took some six times that of `sasrec.py`,
so for larger sets one wants a GPU or TPU.
"""

from dataclasses import replace
from pathlib import Path
from runpy import run_path

from jaxrec.training.config import Published

base = run_path(str(Path(__file__).with_name("sasrec.py")))["config"]
_SOURCE = "Gusak et al. 2025, SASRec, best of the grid by validation"
_NOTE = "d=256, 3 blocks, 1 head, dropout 0.3, length 128"

config = replace(
    base,
    name="sasrec_wide",
    model=replace(base.model, width=256, blocks=3, dropout=0.3),
    published={
        "movielens-1m": (Published(_SOURCE, {"hr@10": 0.3207, "ndcg@10": 0.1858}, _NOTE),),
        "amazon-2014-beauty": (Published(_SOURCE, {"hr@10": 0.0974, "ndcg@10": 0.0588}, _NOTE),),
    },
)

"""SASRec with generalised BCE against 256 negatives of each position: gSASRec's objective.

    jaxrec train experiments/sasrec_gbce.py --data NAME --out runs/sasrec_gbce

Everything but the loss is as in `sasrec.py`: width 64, and one item table where gSASRec's own runs
have width 128 and a second table for scores.
"""

from dataclasses import replace
from pathlib import Path
from runpy import run_path

from jaxrec.training.config import LossConfig, Published

base = run_path(str(Path(__file__).with_name("sasrec.py")))["config"]

config = replace(
    base,
    name="sasrec_gbce",
    loss=LossConfig(name="gbce", negatives=256, t=0.75),
    published={
        "movielens-1m": (
            Published(
                "Petrov and Macdonald 2023, gSASRec",
                {"hr@10": 0.3003, "ndcg@10": 0.1726},
                "d=128, length 200",
            ),
            Published(
                "Tikhonovich et al. 2025, gSASRec",
                {"hr@10": 0.3134},
                "recall@10 only",
            ),
        ),
    },
)

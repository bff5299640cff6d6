"""SASRec with generalised BCE against 256 negatives of each position: gSASRec's objective.

    jaxrec train experiments/sasrec_gbce.py --data NAME --out runs/sasrec_gbce

All but the loss, `b2` and `patience` is as in `sasrec.py`: width 64, and one item table where
gSASRec's own runs have width 128 and a second table for scores. At first the gradients of 256
negatives are hundreds of times those of later (seen on ML-1M), which Adam's usual `b2` of 0.999
remembers for thousands of steps, so it is 0.98. Even so a run on ML-1M learned no more than what is
popular in its first 18 epochs, and began to learn after: hence a patience of 50 validations.
"""

from dataclasses import replace
from pathlib import Path
from runpy import run_path

from jaxrec.training.config import LossConfig, OptimizerConfig, Published

base = run_path(str(Path(__file__).with_name("sasrec.py")))["config"]

config = replace(
    base,
    name="sasrec_gbce",
    optimizer=OptimizerConfig(b2=0.98),
    training=replace(base.training, patience=50),
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

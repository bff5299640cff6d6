"""SASRec with full cross-entropy, for any prepared data set.

    jaxrec train experiments/sasrec.py --data NAME --out runs/sasrec

Two blocks of width 64. Sequences are packed, so the length of 200 costs nothing where histories are
short. The published numbers are those of leave-one-out with full ranking and seen items left out.
"""

from jaxrec.models.config import SASRecConfig
from jaxrec.training.config import (
    DataConfig,
    EvaluationConfig,
    Experiment,
    Published,
    TrainingConfig,
)

config = Experiment(
    name="sasrec",
    data=DataConfig(max_length=200),
    model=SASRecConfig(width=64, blocks=2, heads=1, dropout=0.2),
    training=TrainingConfig(batch_size=128, epochs=200, patience=10),
    evaluation=EvaluationConfig(ks=(1, 5, 10, 20)),
    published={
        "movielens-1m": (
            Published(
                "Klenitskiy and Vasilev 2023, SASRec with full cross-entropy",
                {"hr@10": 0.3152, "ndcg@10": 0.1821},
                "d=64, length 200",
            ),
            Published(
                "Gusak et al. 2025, SASRec, best of the grid with d=64",
                {"hr@10": 0.3060, "ndcg@10": 0.1766},
                "length 128",
            ),
        ),
        "amazon-2014-beauty": (
            Published(
                "Gusak et al. 2025, SASRec, best of the grid with d=64",
                {"hr@10": 0.0907, "ndcg@10": 0.0563},
                "3 blocks, 2 heads, length 128",
            ),
            Published(
                "Gusak et al. 2025, SASRec, median of the grid",
                {"hr@10": 0.0917, "ndcg@10": 0.0561},
            ),
        ),
    },
)

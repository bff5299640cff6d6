"""eSASRec: gated (LiGR) layers trained with softmax over 256 negatives of each position.

    jaxrec train experiments/esasrec.py --data NAME --out runs/esasrec

The published recipe for MovieLens-1M, but stopped by NDCG@10 on the validation targets as all
configs here are. For Amazon Beauty it has one block, dropout 0.2 and sequences of 50
(`--model.blocks 1 --model.dropout 0.2 --data.max-length 50`). Matrices begin as the authors'
library has them, by Xavier's rule: the model has no last norm, and with N(0, 0.02) everywhere a
state begins as little more than its own item's vector.
"""

from jaxrec.models.config import ESASRecConfig
from jaxrec.training.config import (
    DataConfig,
    EvaluationConfig,
    Experiment,
    LossConfig,
    OptimizerConfig,
    Published,
    TrainingConfig,
)

config = Experiment(
    name="esasrec",
    data=DataConfig(max_length=200),
    model=ESASRecConfig(width=64, blocks=2, heads=1, dropout=0.1, init_scale=None),
    loss=LossConfig(name="sampled_softmax", negatives=256),
    optimizer=OptimizerConfig(b2=0.98),
    training=TrainingConfig(batch_size=128, epochs=200, patience=10),
    evaluation=EvaluationConfig(ks=(1, 5, 10, 20)),
    published={
        "movielens-1m": (
            Published(
                "Tikhonovich et al. 2025, eSASRec",
                {"hr@10": 0.3133, "ndcg@10": 0.1772},
                "1 to 4 layers, all 3,706 items",
            ),
        ),
        "amazon-2014-beauty": (
            Published(
                "Tikhonovich et al. 2025, eSASRec",
                {"hr@10": 0.0928, "ndcg@10": 0.0523},
                "1 block, length 50, without cold items",
            ),
        ),
    },
)

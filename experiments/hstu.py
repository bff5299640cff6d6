"""HSTU in its research configuration: cosine scores, 128 negatives a position, temperature 0.05.

    jaxrec train experiments/hstu.py --data NAME --out runs/hstu

The published recipe trains on everything but the last event and looks at the test target every
epoch; here the last but one event is for validation, and the best checkpoint is judged once.
"""

from jaxrec.models.config import HSTUConfig
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
    name="hstu",
    data=DataConfig(max_length=200),
    model=HSTUConfig(width=50, blocks=2, heads=1, dropout=0.2),
    loss=LossConfig(name="sampled_softmax", negatives=128, temperature=0.05, avoid="target"),
    optimizer=OptimizerConfig(b2=0.98),
    training=TrainingConfig(batch_size=128, epochs=200, patience=10),
    evaluation=EvaluationConfig(ks=(1, 5, 10, 20)),
    published={
        "movielens-1m": (
            Published(
                "Zhai et al. 2024, HSTU",
                {"hr@10": 0.3097, "ndcg@10": 0.1720},
                "all 3,706 items, its own protocol",
            ),
            Published(
                "Tikhonovich et al. 2025, HSTU run again",
                {"hr@10": 0.3037, "ndcg@10": 0.1719},
                "1 to 4 layers, all 3,706 items",
            ),
        ),
        "amazon-2014-beauty": (
            Published(
                "RecBoard, HSTU",
                {"hr@10": 0.0945, "ndcg@10": 0.0543},
                "width 64, length 50, mean of 5 seeds",
            ),
            Published(
                "Tikhonovich et al. 2025, HSTU run again",
                {"hr@10": 0.0788, "ndcg@10": 0.0439},
                "length 50, without cold items",
            ),
        ),
    },
)

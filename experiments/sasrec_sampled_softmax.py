"""SASRec with softmax over 256 negatives of each position.

    jaxrec train experiments/sasrec_sampled_softmax.py --data NAME --out runs/sasrec_sampled_softmax

Everything but the loss is as in `sasrec.py`. The negatives are uniform over the catalogue, the
target included, without a correction.
"""

from dataclasses import replace
from pathlib import Path
from runpy import run_path

from jaxrec.training.config import LossConfig, Published

base = run_path(str(Path(__file__).with_name("sasrec.py")))["config"]

config = replace(
    base,
    name="sasrec_sampled_softmax",
    loss=LossConfig(name="sampled_softmax", negatives=256),
    published={
        "movielens-1m": (
            Published(
                "Tikhonovich et al. 2025, SASRec with sampled softmax",
                {"hr@10": 0.2867},
                "recall@10 only",
            ),
            Published(
                "Klenitskiy and Vasilev 2023, SASRec with 3000 negatives a sequence",
                {"hr@10": 0.3159, "ndcg@10": 0.1857},
                "d=64, length 200",
            ),
        ),
        "amazon-2014-beauty": (
            Published(
                "Tikhonovich et al. 2025, SASRec with sampled softmax",
                {"hr@10": 0.0921, "ndcg@10": 0.0531},
                "1 block, length 50, without cold items",
            ),
        ),
    },
)

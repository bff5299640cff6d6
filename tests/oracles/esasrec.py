"""eSASRec in float64 for one sequence alone, straight from the formula; dropout off.

a = W_o Attention(LN(x)), x = x + sigmoid(W_g1 x + b_1) a;
z = LN(x), x = x + sigmoid(W_g2 x + b_2) W_2 (SiLU(W_1 z) * W_3 z).
"""

import numpy as np
from oracles.sasrec import attention, distance_bias, layer_norm, rotated


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def hidden(parameters, items, config):
    """float64[length, width]: the state after every event of a sequence."""
    p = {name: np.asarray(value, np.float64) for name, value in parameters.items()}

    def linear(name, x):
        y = x @ p[f"{name}.kernel"]
        return y + p[f"{name}.bias"] if f"{name}.bias" in p else y

    def norm(name, x):
        return layer_norm(x, p[f"{name}.scale"], p[f"{name}.bias"], config.norm_epsilon)

    length = len(items)
    x = p["item_embedding"][list(items)]
    if config.scale_embedding:
        x = x * np.sqrt(config.width)
    if config.position == "additive":
        newest_first = np.arange(length)[::-1]
        x = (
            x
            + p["position_embedding"][
                newest_first if config.position_order == "newest" else np.arange(length)
            ]
        )
    for b in range(config.blocks):
        name = f"blocks.{b}"
        n = norm(f"{name}.attention_norm", x)
        query, key, value = (linear(f"{name}.{part}", n) for part in ("query", "key", "value"))
        size = config.width // config.heads
        attended = np.zeros((length, config.width))
        for h in range(config.heads):
            own = slice(h * size, (h + 1) * size)
            attended[:, own] = attention(
                rotated(query[:, own], config),
                rotated(key[:, own], config),
                value[:, own],
                np.eye(length),
                np.eye(length),
                distance_bias(p, config, b, h, length),
            )
        a = linear(f"{name}.output", attended)
        x = x + sigmoid(linear(f"{name}.attention_gate", x)) * a
        z = norm(f"{name}.feed_forward_norm", x)
        inner = linear(f"{name}.expand", z)
        inner = inner * sigmoid(inner) * linear(f"{name}.expand_gate", z)
        out = linear(f"{name}.contract", inner)
        x = x + sigmoid(linear(f"{name}.feed_forward_gate", x)) * out
    return x


def item_table(parameters, config):
    table = parameters.get("output_embedding", parameters["item_embedding"])
    return np.asarray(table, np.float64)

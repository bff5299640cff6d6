"""HSTU in float64 for one sequence alone, straight from the formula; dropout off.

[U, V, Q, K] = split(SiLU(LN(x) W));  A_ij = SiLU(s <q_i, k_j> + bias_ij) / N for j <= i;
bias_ij = pos[N - 1 + j - i] + time[bucket(t_{i+1} - t_j)];  x = x + (U * LN(A V)) W_o + b_o.
"""

import numpy as np


def silu(a):
    return a / (1 + np.exp(-a))


def bucket(seconds, buckets):
    return min(buckets, int(np.floor(np.log(max(abs(int(seconds)), 1)) / 0.301)))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def hidden(parameters, items, times, config, max_length):
    """float64[length, width]: the state after every event of a sequence."""
    p = {name: np.asarray(value, np.float64) for name, value in parameters.items()}
    length, heads = len(items), config.heads
    queries = config.query_width or config.width // heads
    values = config.value_width or config.width // heads
    normalizer = config.normalizer or max_length + 11
    scale = 1.0 if config.scale == "one" else queries**-0.5
    following = [*times[1:], times[-1]]

    def norm(name, x):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        y = (x - mean) / np.sqrt(variance + config.norm_epsilon)
        return y * p[f"{name}.scale"] + p[f"{name}.bias"] if config.norm_affine else y

    x = p["item_embedding"][list(items)]
    if config.scale_embedding:
        x = x * np.sqrt(config.width)
    if config.position == "additive":
        x = x + p["position_embedding"][np.arange(length)]
    for b in range(config.blocks):
        name = f"blocks.{b}"
        mixed = norm(f"{name}.input_norm", x) @ p[f"{name}.project.kernel"]
        if config.projection_bias:
            mixed = mixed + p[f"{name}.project.bias"]
        if config.silu == "uvqk":
            mixed = silu(mixed)
        edges = np.cumsum([heads * values, heads * values, heads * queries])
        gate, value, query, key = np.split(mixed, edges, axis=1)
        if config.silu == "u":
            gate = silu(gate)
        out = np.zeros((length, heads, values))
        for h in range(heads):
            q = query[:, h * queries : (h + 1) * queries]
            k = key[:, h * queries : (h + 1) * queries]
            v = value[:, h * values : (h + 1) * values]
            for i in range(length):
                for j in range(i + 1):
                    bias = 0.0
                    if "position" in config.bias:
                        bias += p[f"{name}.bias.position"][max_length - 1 + j - i]
                    if "time" in config.bias:
                        where = bucket(following[i] - times[j], config.time_buckets)
                        bias += p[f"{name}.bias.time"][where]
                    out[i, h] += silu(scale * q[i] @ k[j] + bias) / normalizer * v[j]
        flat = out.reshape(length, -1)
        normed = norm(f"{name}.output_norm", out if config.group_norm else flat)
        y = gate * normed.reshape(length, -1)
        if config.concat:
            y = np.concatenate([gate, flat, y], axis=1)
        x = x + y @ p[f"{name}.output.kernel"] + p[f"{name}.output.bias"]
    return unit(x) if config.normalize else x


def item_table(parameters, config):
    table = parameters.get("output_embedding", parameters["item_embedding"])
    table = np.asarray(table, np.float64)
    return unit(table) if config.normalize else table

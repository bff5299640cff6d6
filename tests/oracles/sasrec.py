"""SASRec in float64 for one sequence alone, straight from the formula; dropout off.

x = sqrt(d) E[s] + P[position];  a block: q = LN(x) Wq, k = x Wk, v = x Wv,
Z = (q k^T / sqrt(d_head)) U, A = softmax(Z + causal mask), attended = A (L v) Wo,
y = residual + attended, z = LN(y), x = z_or_y + W2 f(W1 z);  in the end LN(x).
"""

import numpy as np


def layer_norm(x, scale, bias, epsilon):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * scale + bias


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(z):
    w = np.exp(z - z.max(-1, keepdims=True))
    return w / w.sum(-1, keepdims=True)


def upper_factor(kernel, structure, length):
    """U of a sequence of `length` events: [length, length], upper triangular."""
    if structure == "identity":
        return np.eye(length)
    if structure == "full":
        # The newest event is the last row and column.
        return np.triu(kernel[-length:, -length:])
    factor = np.zeros((length, length))
    for early in range(length):
        for late in range(early, length):
            if late - early < len(kernel):
                factor[early, late] = kernel[late - early]
    return factor


def lower_factor(kernel, structure, length):
    if structure == "full":
        return np.tril(kernel[-length:, -length:])
    return upper_factor(kernel, structure, length).T


def distance_bias(parameters, config, block, head, length):
    """What is added to the logits, by distance, of one head of a block."""
    distance = np.arange(length)
    if config.position == "alibi":
        ratio = 1.0 if config.alibi_slope is None else config.alibi_slope / 2.0**-8
        return -ratio * 2.0 ** (-8 * (head + 1) / config.heads) * distance
    if config.position == "t5":
        # Distances below 16 are their own buckets, and tests are no longer.
        assert length <= 16
        return parameters["blocks.0.bias.table"][distance, head]
    if config.position == "relative":
        return parameters[f"blocks.{block}.bias.table"][distance]
    return np.zeros(length)


def rotated(x, config):
    """Pairs (r, r + half) of an event's channels, turned by its position times an angle."""
    if config.position != "rope":
        return x
    half = x.shape[1] // 2
    out = np.empty_like(x)
    for position, row in enumerate(x):
        for r in range(half):
            angle = position * config.rope_base ** (-r / half)
            a, b = row[r], row[r + half]
            out[position, r] = a * np.cos(angle) - b * np.sin(angle)
            out[position, r + half] = a * np.sin(angle) + b * np.cos(angle)
    return out


def attention(query, key, value, upper, lower, bias):
    """One head: [length, width] each; `bias` is by distance."""
    z = query @ key.T / np.sqrt(query.shape[1]) @ upper
    for i in range(len(z)):
        for j in range(i + 1):
            z[i, j] += bias[i - j]
    causal = np.tril(np.ones(z.shape, bool))
    return softmax(np.where(causal, z, -np.inf)) @ (lower @ value)


def factors_of(parameters, block, config, head, length):
    """U and L of one head of a block."""
    if "kernel" not in config.position:
        return np.eye(length), np.eye(length)
    owner = 0 if config.kernel.shared else block
    found = {}
    for name in ("logits", "values"):
        kernel = parameters.get(f"blocks.{owner}.kernel.{name}")
        found[name] = kernel[head] if kernel is not None and config.kernel.per_head else kernel
    upper = upper_factor(found["logits"], config.kernel.logits, length)
    if config.kernel.tie:
        return upper, upper.T
    return upper, lower_factor(found["values"], config.kernel.values, length)


def hidden(parameters, items, config):
    """float64[length, width]: the state after every event of a sequence.

    Args:
      parameters: by dotted name.
      items: item indices, oldest first.
      config: SASRecConfig.
    """
    p = {name: np.asarray(value, np.float64) for name, value in parameters.items()}

    def linear(name, x):
        return x @ p[f"{name}.kernel"] + p[f"{name}.bias"]

    def norm(name, x):
        return layer_norm(x, p[f"{name}.scale"], p[f"{name}.bias"], config.norm_epsilon)

    length = len(items)
    x = p["item_embedding"][list(items)]
    if config.scale_embedding:
        x = x * np.sqrt(config.width)
    if "additive" in config.position:
        positions = np.arange(length)
        if config.position_order == "newest":
            positions = length - 1 - positions
        x = x + p["position_embedding"][positions]
    for b in range(config.blocks):
        name = f"blocks.{b}"
        normalized = norm(f"{name}.attention_norm", x)
        query = linear(f"{name}.query", normalized)
        key, value = linear(f"{name}.key", x), linear(f"{name}.value", x)
        head_width = config.width // config.heads
        attended = np.zeros((length, config.width))
        for h in range(config.heads):
            own = slice(h * head_width, (h + 1) * head_width)
            upper, lower = factors_of(p, b, config, h, length)
            attended[:, own] = attention(
                rotated(query[:, own], config),
                rotated(key[:, own], config),
                value[:, own],
                upper,
                lower,
                distance_bias(p, config, b, h, length),
            )
        if config.output_projection:
            attended = linear(f"{name}.output", attended)
        original = config.residual == "normalized"
        y = attended + (normalized if original else x)
        z = norm(f"{name}.feed_forward_norm", y)
        inner = {"relu": lambda a: np.maximum(a, 0.0), "silu": lambda a: a / (1 + np.exp(-a))}
        inner = inner[config.activation](linear(f"{name}.expand", z))
        x = linear(f"{name}.contract", inner) + (z if original else y)
    return unit(norm("norm", x)) if config.normalize else norm("norm", x)


def mean_loss(parameters, sequences, config):
    """Mean softmax cross-entropy over the catalogue of every next item of all sequences.

    Args:
      sequences: item indices with one more event than is read, which is a target only.
    """
    losses = []
    table = parameters.get("output_embedding", parameters["item_embedding"])
    table = np.asarray(table, np.float64)
    table = unit(table) if config.normalize else table
    for sequence in sequences:
        states = hidden(parameters, sequence[:-1], config)
        chances = softmax(states @ table.T)
        losses += [-np.log(row[item]) for row, item in zip(chances, sequence[1:], strict=True)]
    return np.mean(losses)

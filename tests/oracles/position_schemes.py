"""Schemes that tell attention where events stand, in float64 and whole numbers."""

import math

import numpy as np


def t5_bucket(distance, buckets=32, max_distance=128):
    """`min(buckets - 1, e + floor(ln(D / e) / ln(max / e) far))`, counted in whole numbers."""
    near = buckets // 2
    far = buckets - near
    if distance < near:
        return max(distance, 0)
    steps = 0
    # (D / e)^far >= (max / e)^(steps + 1)
    while (
        steps + 1 < far
        and distance**far * near ** (steps + 1) >= max_distance ** (steps + 1) * near**far
    ):
        steps += 1
    return near + steps


def rotary_embedding(x, positions, base, layout):
    x = np.asarray(x, np.float64)
    batch, length, heads, width = x.shape
    out = np.zeros(x.shape)
    for b, i, h in np.ndindex(batch, length, heads):
        for r in range(width // 2):
            first, second = (r, r + width // 2) if layout == "half" else (2 * r, 2 * r + 1)
            angle = int(positions[b, i]) * base ** (-2 * r / width)
            turned = complex(x[b, i, h, first], x[b, i, h, second]) * complex(
                math.cos(angle), math.sin(angle)
            )
            out[b, i, h, first], out[b, i, h, second] = turned.real, turned.imag
    return out

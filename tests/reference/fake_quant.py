"""Fake quantization one number at a time: integers, numpy scalars, rounding of bfloat16 on its bit pattern.

Shares nothing with the library: no torch, no vectorised rounding, ties decided by integer arithmetic.
"""

import math
import struct

import numpy as np


def to_bfloat16(value):
    """The nearest bfloat16 of a float, ties to even, as a float (finite inputs)."""
    bits = struct.unpack("<I", struct.pack("<f", np.float32(value)))[0]
    rest, kept = bits & 0xFFFF, bits >> 16
    if rest > 0x8000 or (rest == 0x8000 and kept & 1):
        kept += 1
    return struct.unpack("<f", struct.pack("<I", kept << 16))[0]


def to_float16(value):
    """The nearest float16 of a float32."""
    return float(np.float16(np.float32(value)))


def to_float32(value):
    """The nearest float32 of a float."""
    return float(np.float32(value))


ROUND = {"bfloat16": to_bfloat16, "float16": to_float16, "float32": to_float32}
SMALLEST = {"bfloat16": 2.0**-126, "float16": 2.0**-14, "float32": 2.0**-126}
LARGEST = {"bfloat16": 2.0**127 * (2 - 2.0**-7), "float16": 65504.0, "float32": 2.0**127 * (2 - 2.0**-23)}


def scale(theta, stored):
    """exp(theta) as a normal number of the stored type, at most the largest / 128."""
    exact = math.exp(min(theta, 700.0))
    return ROUND[stored](min(max(exact, SMALLEST[stored]), LARGEST[stored] / 128))


def nearest(value):
    """The nearest integer, ties to even."""
    low = math.floor(value)
    rest = value - low
    if rest > 0.5 or (rest == 0.5 and low % 2):
        return low + 1
    return low


def code(weight, s, num_bits):
    """clip(round(w / s)) with the division in float32."""
    ratio = float(np.float32(weight) / np.float32(s))
    return min(max(nearest(ratio), -(2 ** (num_bits - 1))), 2 ** (num_bits - 1) - 1)


def quantize(weight, theta, num_bits, stored):
    """(codes, dequantised weights) as nested lists; ``theta`` holds one number per group of each row."""
    codes, values = [], []
    for row, thetas in zip(weight, theta, strict=True):
        size = len(row) // len(thetas)
        scales = [scale(thetas[i // size], stored) for i in range(len(row))]
        line = [code(w, s, num_bits) for w, s in zip(row, scales, strict=True)]
        codes.append(line)
        values.append([ROUND[stored](q * s) for q, s in zip(line, scales, strict=True)])
    return codes, values


def gradients(weight, theta, grad, num_bits, stored):
    """(dL/dw, dL/dtheta) of the straight-through estimator, summed by ``math.fsum``."""
    low, high = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    by_weight, by_theta = [], []
    for row, thetas, upstream in zip(weight, theta, grad, strict=True):
        size = len(row) // len(thetas)
        line, terms = [], [[] for _ in thetas]
        for i, (w, g) in enumerate(zip(row, upstream, strict=True)):
            s = scale(thetas[i // size], stored)
            ratio = w / s
            if nearest(ratio) < low:
                line.append(0.0)
                terms[i // size].append(g * low)
            elif nearest(ratio) > high:
                line.append(0.0)
                terms[i // size].append(g * high)
            else:
                line.append(g)
                terms[i // size].append(g * (nearest(ratio) - ratio))
        by_weight.append(line)
        by_theta.append([scale(t, stored) * math.fsum(part) for t, part in zip(thetas, terms, strict=True)])
    return by_weight, by_theta


def best_factor(group, num_bits, stored, factors):
    """The stored scale of least squared error among factors * max|w| / q_max (the first of equals)."""
    low, high = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    best, chosen = math.inf, None
    for factor in factors:
        s = ROUND[stored](min(max(max(abs(w) for w in group) / high * factor, SMALLEST[stored]), LARGEST[stored] / 128))
        error = math.fsum((min(max(nearest(w / s), low), high) * s - w) ** 2 for w in group)
        if error < best:
            best, chosen = error, s
    return chosen, best

"""Centred kernel alignment exactly as it is written down: kernel matrices, the centring matrix, numpy float64."""

import numpy as np


def centred_kernel(features):
    """H K H with K = V V^T."""
    features = np.asarray(features, dtype=np.float64)
    n = features.shape[0]
    centring = np.eye(n) - np.ones((n, n)) / n
    return centring @ (features @ features.T) @ centring


def cka(features_t, features_s):
    """<K~_T, K~_S> / (|K~_T| |K~_S|), by traces."""
    kernel_t, kernel_s = centred_kernel(features_t), centred_kernel(features_s)
    return np.trace(kernel_t @ kernel_s) / np.sqrt(np.trace(kernel_t @ kernel_t) * np.trace(kernel_s @ kernel_s))


def relational(hidden_s, hidden_t, sizes):
    """Sum of 1 - CKA over images of at least 4 tokens, rows normalised one by one, and their number."""
    hidden_s, hidden_t = np.asarray(hidden_s, np.float64), np.asarray(hidden_t, np.float64)
    total, counted, start = 0.0, 0, 0
    for size in sizes:
        rows = range(start, start + size)
        start += size
        if size < 4:
            continue
        unit_s = np.stack([hidden_s[i] / np.sqrt(np.sum(hidden_s[i] ** 2)) for i in rows])
        unit_t = np.stack([hidden_t[i] / np.sqrt(np.sum(hidden_t[i] ** 2)) for i in rows])
        total += 1.0 - cka(unit_t, unit_s)
        counted += 1
    return total, counted

"""The controller from the whole history at once: the exponential moving average in closed form, numpy float64."""

import numpy as np


def dual_ascent(values, *, tau, eta, beta_start=0.5, beta_min=0.1, beta_max=1.0, decay=0.99):
    """Return (ema, beta) after every step."""
    values = np.asarray(values, float)
    found, beta = [], beta_start
    for n in range(1, len(values) + 1):
        ages = np.arange(n - 2, -1, -1)
        ema = decay ** (n - 1) * values[0] + (1 - decay) * np.sum(decay**ages * values[1:n])
        beta = float(np.clip(beta + eta * (ema - tau), beta_min, beta_max))
        found.append((ema, beta))
    return found

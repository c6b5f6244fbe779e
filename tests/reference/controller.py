"""The controller computed from the whole history at once: closed-form averages, segments as slices, numpy float64.

The library walks forward with running sums; here each step looks back at all values so far.
"""

import numpy as np


def smoothed(first, values, decay):
    """EMA that starts at ``first`` and then takes ``values``; one number per value, in closed form."""
    found = []
    for n in range(1, len(values) + 1):
        ages = np.arange(n - 1, -1, -1)
        found.append(decay**n * first + (1 - decay) * np.sum(decay**ages * np.asarray(values[:n])))
    return np.array(found)


def boundaries(probe, total, steps):
    """Counted steps at which a segment ends: the probe, then growth by half, at most 5 % of the run."""
    found = [probe]
    for n in range(probe + 1, steps + 1):
        if n >= found[-1] * 1.5 or n >= found[-1] + 0.05 * total:
            found.append(n)
    return found


def targets(values, travelled, probe, total):
    """Unsmoothed target of every step after the probe."""
    ends = boundaries(probe, total, len(values))
    starts = [0, *ends[:-1]]
    means = [np.mean(values[a:b]) for a, b in zip(starts, ends, strict=True)]
    places = [np.mean(np.log(travelled[a:b])) for a, b in zip(starts, ends, strict=True)]
    found, lowest = [], means[0]
    for n in range(probe + 1, len(values) + 1):
        k = max(i for i, end in enumerate(ends) if end <= n)
        slope = 0.0
        if k > 0:
            slope = (np.log(means[k - 1]) - np.log(means[k])) / max(places[k] - places[k - 1], 1e-3)
            slope = min(max(slope, 0.0), 2.0)
        lowest = min(lowest, means[k] * (travelled[n - 1] / np.exp(places[k])) ** -slope)
        found.append(lowest)
    return np.array(found)


def automatic(values, fractions, total, beta_min=0.1, beta_max=1.0, beta_start=0.5, decay=0.99, elasticity=0.2):
    """(beta, tau, eta) after every step of the probe and the run, defaults as the method states them."""
    values, travelled = np.asarray(values, float), np.cumsum(fractions)
    probe = int(min(100, max(5, np.floor(0.05 * total))))
    ema = np.concatenate([[values[0]], smoothed(values[0], values[1:], decay)])
    still = int(np.sum(travelled == 0))  # leading steps at rate 0: in the average, in no segment
    values, travelled, ema = values[still:], travelled[still:], ema[still:]
    reference = smoothed(ema[probe - 1], targets(values, travelled, probe, total), decay)
    beta, rows = beta_start, [(beta_start, None, None)] * (still + probe)
    for i, level in enumerate(reference):
        followed = 1 - decay ** max(i + 1, total / 10)
        tau = level * (1 + elasticity * followed * (2 * (beta - beta_min) / (beta_max - beta_min) - 1))
        eta = (beta_max - beta_min) / (total / 10 * 0.1 * level * followed)
        beta = float(np.clip(beta + eta * (ema[probe + i] - tau), beta_min, beta_max))
        rows.append((beta, tau, eta))
    return rows

"""Measure speed and memory of each part next to a baseline; `python -m benchmarks.speed --help`."""

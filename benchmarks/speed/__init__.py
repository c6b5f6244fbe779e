"""Speed and memory of every room beside what it cannot do without; `python -m benchmarks.speed --help`."""

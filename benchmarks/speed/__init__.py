"""Speed and memory of every room next to what it cannot do without; `python -m benchmarks.speed --help`."""

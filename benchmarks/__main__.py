"""`make bench`: the speed of each room beside its floor on this machine; see benchmarks/speed.py."""

from benchmarks.speed import main

main()

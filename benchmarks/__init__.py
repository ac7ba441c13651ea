"""Benchmarks: each stands beside its peer in one run and gives a ratio. `python -m benchmarks` writes docs/benchmarks.md."""

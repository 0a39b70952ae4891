"""Benchmarks: `python -m bench.compare`, `bench.overhead`, `bench.memory`, `bench.machine`; the
record is NOTES.md.
"""

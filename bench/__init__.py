"""Benchmarks: `python -m bench.compare`, `bench.overhead`, `bench.memory`, `bench.machine`; on GPUs
`bench.first_gpu`; the record is NOTES.md.
"""

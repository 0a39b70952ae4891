"""The steps of `python -m bench.first_gpu`, each a process of its own that can be run by itself."""

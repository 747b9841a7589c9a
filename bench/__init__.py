"""Benchmarks, `python -m bench`, and scripts beside them: `bench.picture`, `bench.shapes_ceiling`, `bench.widths`."""

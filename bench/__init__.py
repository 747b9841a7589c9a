"""Benchmarks, `python -m bench`, and two scripts beside them: `bench.shapes_ceiling` and `bench.picture`."""

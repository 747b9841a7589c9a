"""Benchmarks, `python -m bench`, and scripts beside them: `bench.curves`, `bench.picture`, `bench.shapes_ceiling`,
`bench.widths`."""

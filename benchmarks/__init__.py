"""Benchmarks: each writes a JSON under `benchmarks/results/`, and tables are made from these files only."""

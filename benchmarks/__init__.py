"""Benchmarks: one module per question, each against its baseline in the same run. `python -m benchmarks` runs all."""

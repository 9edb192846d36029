"""Benchmarks: contenders in turns in one run, on what the user has."""

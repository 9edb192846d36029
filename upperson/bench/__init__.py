"""Benchmarks: what a step costs, against a literal implementation of the paper's formulas."""

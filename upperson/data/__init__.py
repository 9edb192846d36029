"""Data sets as records, their transforms and the synthetic people."""

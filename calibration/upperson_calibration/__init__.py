"""Calibration: which samples set the ranges of INT8 activations, and how they are fed."""

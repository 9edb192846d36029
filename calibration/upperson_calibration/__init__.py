"""Calibration: which samples set the ranges of INT8 activations, and how they are fed."""

import upperson_rt  # noqa: F401 - Before onnxruntime, which it keeps from telling of itself.

"""Export of UP-Person: fold the trained parts, write ONNX, quantize, check, and bundle.

Functions here take a ``torch.nn.Module`` or files, never the training package.
"""

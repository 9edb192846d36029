"""Graph passes: each file changes one thing of an ONNX model in place."""

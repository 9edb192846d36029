"""TensorRT without torch or pycuda: engines are built, checked, kept and run on the device itself.

bindings.py   the `tensorrt` package, loaded only where it can work
cuda.py       memory, streams and graphs through the driver's own library
builder.py    ONNX file to engine, with what TensorRT 10.3 and 11 have in common; its comparison
cache.py      engine files and what is known about them
session.py    runs an engine

``upperson_tensorrt/compile.py`` does all of it for a bundle.
"""

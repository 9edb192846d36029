"""Adapters: what a run trained, in one file, and a base bundle turned into a site's with it.

Folding, smoothing and quantization of weights are in `weights`, with numpy alone; the export uses
the same functions. `package` is the file, `apply` makes the bundle.
"""

"""Commands of `upperson-rt gallery`."""

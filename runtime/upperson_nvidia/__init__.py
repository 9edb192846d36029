"""NVIDIA's driver, before any library that needs it is loaded."""

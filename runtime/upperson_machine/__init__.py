"""This machine: its description, NVIDIA's driver, and how its processor adds int8."""

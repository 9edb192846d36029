"""Comparisons with what one would write or call without this project. No part of any wheel.

``make bench`` runs all of them one after the other, at the sizes that docs/dev/benchmarks.md shows;
``make bench NAME=gallery`` runs one. Each is a script with options of its own, such as
``python -m benchmarks.gallery --rows 10000``. It prints its conditions and tables, and ends with
one line of JSON.
"""

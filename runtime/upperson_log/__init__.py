"""Logs whose lines are chained by checksums: of queries, before their hits, and of erasures.

The core finds both by their entry points, ``upperson.services``.
"""

"""Ingest: one path from a picture or a frame with boxes to committed rows."""

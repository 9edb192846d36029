"""Keeping a gallery: backups, proofs of erasure, retention, and exports as plain files."""

"""Diagnosis of an installation, a bundle, a gallery, a query log and a detector."""

"""Fits score calibrations: from pictures with captions to likelihoods of an embedding space."""

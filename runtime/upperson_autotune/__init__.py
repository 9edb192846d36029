"""Chooses the fastest of the installed backends by measuring them."""

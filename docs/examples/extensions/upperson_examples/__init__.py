"""One extension of each kind for upperson-rt."""

"""Checkpoints of the official UP-Person and IRRA code, turned into runs of this toolkit.

``mapping`` knows the official names, reads off the settings they stand for, and gives every tensor
our name; ``importing`` reads the file and writes the run folder.
"""

"""Checkpoints of the official UP-Person and IRRA code, turned into runs of this toolkit.

``names`` knows the official names and reads off the settings they stand for, ``mapping`` gives the
tensors ours and accounts for every one, ``importing`` reads the file and writes the run folder.
"""

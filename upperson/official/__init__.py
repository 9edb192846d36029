"""Checkpoints of the official UP-Person and IRRA code, turned into runs of this toolkit.

``reading`` gets named tensors out of a file from elsewhere without running anything in it,
``names``, ``settings`` and ``mapping`` give them our names and read off the settings they stand
for, ``importing`` writes the run folder.
"""

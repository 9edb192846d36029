"""Shards: one part of a list of pictures for each machine, and the proof that the parts are whole.

``records`` divides a list and says what a shard holds, ``indexing`` indexes one, ``merge`` joins
them into a gallery.
"""

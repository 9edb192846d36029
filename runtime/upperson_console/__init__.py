"""The console: pages for people and an API for programs, over a bundle and a gallery.

Needs the extra ``serve``; `upperson-rt serve` starts it.
"""

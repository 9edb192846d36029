"""Training side of UP-Person Edge: model, data, loss, training and evaluation.

Importing this package does not import torch; its modules do.
"""

from upperson_rt import __version__

__all__ = ["__version__"]

"""Synthetic pedestrians with captions, in a studio look and in a street look."""

from upperson.data.synthetic.captions import describe
from upperson.data.synthetic.dataset import (
    SyntheticSpec,
    generate_people,
    iter_samples,
    write_dataset,
)
from upperson.data.synthetic.look import LOOKS

__all__ = [
    "LOOKS",
    "SyntheticSpec",
    "describe",
    "generate_people",
    "iter_samples",
    "write_dataset",
]

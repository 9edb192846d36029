"""Synthetic pedestrians with captions, in a studio look and in a street look."""

from upperson_synthetic.captions import describe
from upperson_synthetic.dataset import SyntheticSpec, generate_people, iter_samples, write_dataset
from upperson_synthetic.look import LOOKS

__all__ = ["LOOKS", "SyntheticSpec", "describe", "generate_people", "iter_samples", "write_dataset"]

"""Synthetic pedestrians with captions, in a studio look and in a street look."""

from upperson.data.records import SPLITS, Split
from upperson.data.synthetic.captions import describe
from upperson.data.synthetic.generate import (
    SyntheticSpec,
    first_pid,
    generate_people,
    iter_samples,
    write_dataset,
)
from upperson.data.synthetic.look import LOOKS, SOURCE, TARGET, Camera, Look
from upperson.data.synthetic.people import Person, differing_fields, sample_people
from upperson.data.synthetic.render import render_person

__all__ = [
    "LOOKS",
    "SOURCE",
    "SPLITS",
    "TARGET",
    "Camera",
    "Look",
    "Person",
    "Split",
    "SyntheticSpec",
    "describe",
    "differing_fields",
    "first_pid",
    "generate_people",
    "iter_samples",
    "render_person",
    "sample_people",
    "write_dataset",
]

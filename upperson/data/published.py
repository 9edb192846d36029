"""How large the published data sets are, to tell a complete download from a part of one."""

from typing import NamedTuple

from upperson.data.annotations import Split


class Counts(NamedTuple):
    """Size of a split."""

    ids: int
    images: int
    captions: int


PUBLISHED: dict[str, dict[Split, Counts]] = {
    # Li et al., CVPR 2017, and the statistics that loaders of the set state; test captions are what
    # is left of the 80440 in all.
    "cuhk-pedes": {
        "train": Counts(11003, 34054, 68126),
        "val": Counts(1000, 3078, 6158),
        "test": Counts(1000, 3074, 6156),
    },
    # Ding et al., 2021: 54522 images of 4102 people, one caption each, no val split.
    "icfg-pedes": {
        "train": Counts(3102, 34674, 34674),
        "test": Counts(1000, 19848, 19848),
    },
    # Zhu et al., MM 2021: 20505 images of 4101 people, five images each with two captions each.
    "rstpreid": {
        "train": Counts(3701, 18505, 37010),
        "val": Counts(200, 1000, 2000),
        "test": Counts(200, 1000, 2000),
    },
    # Karpathy and Fei-Fei, CVPR 2015: the splits that the files follow. An id is an image.
    "flickr30k": {
        "train": Counts(29000, 29000, 145000),
        "val": Counts(1014, 1014, 5070),
        "test": Counts(1000, 1000, 5000),
    },
    "mscoco": {
        "train": Counts(113287, 113287, 566747),
        "val": Counts(5000, 5000, 25010),
        "test": Counts(5000, 5000, 25010),
    },
}

"""Of whom else a caption is true."""

import numpy as np
import pytest
import torch

from upperson.data.rewording import Sayings
from upperson.losses import asdm_loss, sdm_loss, tal_loss

CAPTIONS = (
    "A woman in a red coat with a backpack. She has short blond hair.",
    "A woman wearing a red coat and blue jeans.",
    "A man in a striped red coat without a backpack.",
    "A man in a blue coat with a tattoo on his arm.",
    "A woman in a red coat and blue jeans with a backpack. She has short blond hair.",
)
LABELS = np.array([0, 0, 1, 2, 3])
PEOPLE = np.arange(4)


@pytest.mark.parametrize(
    ("caption", "people"),
    [
        ("red coat", [0, 1, 3]),
        ("a person in a red overcoat", [0, 1, 3]),
        ("woman in red coat", [0, 3]),
        ("coat", [0, 1, 2, 3]),
        ("a red coat, a backpack and blue jeans", [0, 3]),  # Of the first in two captions.
        ("short blond hair", [0, 3]),
        ("backpack", [0, 3]),
        ("striped coat", []),  # Said of one person only.
        ("without a backpack", []),
        ("blond hair", []),  # Nobody said it so; it might be long.
        ("green coat", []),
        ("blue coat and a tattoo", []),  # The grammar does not know what a tattoo is.
        ("a person", []),
        ("zzz", []),
    ],
)
def test_a_caption_is_true_of_whoever_else_is_said_to_be_so(
    caption: str, people: list[int]
) -> None:
    sayings = Sayings(CAPTIONS, LABELS)
    said_1K, known_4K = sayings.said_by([caption]), sayings.known_of(PEOPLE)
    assert said_1K.shape == (1, sayings.width)
    assert known_4K.shape == (4, sayings.width)
    fits_4 = ~(said_1K & ~known_4K).any(axis=1)
    assert np.flatnonzero(fits_4).tolist() == people


def test_captions_without_a_phrase_are_true_of_nobody() -> None:
    sayings = Sayings(["zzz", "qqq"], np.array([0, 1]))
    assert sayings.width == 1
    assert sayings.said_by(["zzz"]).all()
    assert not sayings.known_of(np.array([0, 1])).any()


@pytest.mark.parametrize("loss", [sdm_loss, asdm_loss, tal_loss])
def test_what_is_right_for_a_text_has_no_share_in_what_is_wrong(loss: object) -> None:
    """Two pictures fit the first text equally: only where one counts as wrong is there a loss."""
    image_NE = torch.nn.functional.normalize(torch.eye(3) + 0.2, dim=-1)
    text_NE = image_NE.clone()
    text_NE[0] = torch.nn.functional.normalize(image_NE[0] + image_NE[1], dim=-1)
    own_NN = torch.eye(3, dtype=torch.bool)
    right_NN = own_NN.clone()
    right_NN[0, 1] = True
    assert callable(loss)
    strict, fair = (float(loss(image_NE, text_NE, each)) for each in (own_NN, right_NN))
    assert fair < strict

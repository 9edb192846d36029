"""What the runtime reads against what training reads: tokens and pixels."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
from PIL import Image
from torchvision.transforms.v2 import functional

from upperson.data.vocabulary import clip_tokenizer
from upperson_rt.preprocess import load_image, resize_image

SENTENCES = [
    "woman in red coat",
    "A man with a BLUE backpack, isn't walking; 3 bags & 2 umbrellas!",
    "  many   spaces\tand\nlines ",
    "caf\u00e9 na\u00efve \u2014 \u201cquoted\u201d \u4e2d\u6587 \U0001f9e5",
    "&amp;lt;b&amp;gt; html",
    "jekyll and hyde",
    "!!! ... '",
    "it's we'll they've I'm you'd don't",
    "x" * 60 + " supercalifragilisticexpialidocious",
]


@pytest.mark.parametrize("sentence", SENTENCES)
def test_tokens_equal_open_clips(sentence: str) -> None:
    expected = open_clip.get_tokenizer("ViT-B-16")([sentence])[0].numpy()
    found = clip_tokenizer().encode([sentence]).input_ids[0]
    assert found.tolist() == expected[: len(found)].tolist()
    assert not expected[len(found) :].any()


def test_a_long_caption_is_cut_like_open_clips() -> None:
    sentence = "a very long description of a woman in a red coat " * 12
    expected = open_clip.get_tokenizer("ViT-B-16")([sentence])[0].numpy()
    batch = clip_tokenizer().encode([sentence])
    assert batch.truncated == [0]
    assert batch.input_ids[0].tolist() == expected.tolist()


@pytest.mark.parametrize("size", [(50, 141), (300, 90), (64, 192), (7, 9)])
def test_resize_equals_torchvisions(tmp_path: Path, size: tuple[int, int]) -> None:
    width, height = size
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path = tmp_path / "person.png"
    Image.fromarray(noise).save(path)
    with Image.open(path) as image:
        expected = functional.resize(image.convert("RGB"), [192, 64], antialias=True)
    assert np.array_equal(resize_image(load_image(path), 192, 64), np.asarray(expected))

"""What the runtime reads against what training reads: tokens and pixels."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
from PIL import Image
from torchvision.transforms.v2 import functional

from tests.helpers.toy_bundle import draw_person
from tests.helpers.toy_clip import toy_model
from upperson.data.vocabulary import clip_tokenizer
from upperson.run import TrainedEncoder, read_pixels
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


def test_tokens_equal_open_clips() -> None:
    long = "a very long description of a woman in a red coat " * 12
    tokenizer = open_clip.get_tokenizer("ViT-B-16")
    for sentence in (*SENTENCES, long):
        expected = tokenizer([sentence])[0].numpy()
        batch = clip_tokenizer().encode([sentence])
        found = batch.input_ids[0]
        assert found.tolist() == expected[: len(found)].tolist()
        assert not expected[len(found) :].any()
        assert batch.truncated == ([0] if sentence is long else [])


@pytest.mark.parametrize("size", [(50, 141), (300, 90), (64, 192), (7, 9)])
def test_resize_equals_torchvisions(tmp_path: Path, size: tuple[int, int]) -> None:
    width, height = size
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path = tmp_path / "person.png"
    Image.fromarray(noise).save(path)
    with Image.open(path) as image:
        expected = functional.resize(image.convert("RGB"), [192, 64], antialias=True)
    assert np.array_equal(resize_image(load_image(path), 192, 64), np.asarray(expected))


def test_a_trained_model_reads_what_the_runtime_reads(tmp_path: Path) -> None:
    files = [draw_person(tmp_path / f"{n}.png", "red", seed=n) for n in range(5)]
    encoder = TrainedEncoder(toy_model())
    size = encoder.model.image_size
    pixels = np.stack([resize_image(load_image(file), *size) for file in files])
    assert np.array_equal(read_pixels(files, size), pixels)
    np.testing.assert_allclose(encoder.read_pixels(files), pixels, atol=0.01)
    images = encoder.encode_images(files, 2)
    assert images.shape == (5, encoder.model.embed_dim)
    np.testing.assert_allclose(images, encoder.run("image", pixels), atol=1e-5)
    captions = ["woman in red coat", "a man", "someone with a blue bag and a hat"]
    ids = encoder.tokenizer.encode(captions).input_ids
    texts = encoder.encode_texts(captions, 2)
    np.testing.assert_allclose(texts, encoder.run("text", ids), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-5)

"""A trained model behind the runtime's calls: files and captions become what its graphs read."""

import numpy as np
import pytest

from tests.helpers.toy_bundle import draw_person
from tests.helpers.toy_clip import toy_model
from upperson.run import TrainedEncoder, read_pixels
from upperson_rt.preprocess import load_image, resize_image


@pytest.fixture
def files(tmp_path):
    return [draw_person(tmp_path / f"{n}.png", "red", seed=n) for n in range(5)]


def test_files_become_the_runtimes_pixels_with_and_without_a_model(files):
    encoder = TrainedEncoder(toy_model())
    size = encoder.model.image_size
    expected = np.stack([resize_image(load_image(file), *size) for file in files])
    assert np.array_equal(read_pixels(files, size), expected)
    np.testing.assert_allclose(encoder.read_pixels(files), expected, atol=0.01)


def test_files_and_captions_embed_as_what_is_prepared_of_them(files):
    encoder = TrainedEncoder(toy_model())
    pixels = read_pixels(files, encoder.model.image_size)
    images = encoder.encode_images(files, 2)
    assert images.shape == (5, encoder.model.embed_dim)
    np.testing.assert_allclose(images, encoder.run("image", pixels), atol=1e-5)
    captions = ["woman in red coat", "a man", "someone with a blue bag and a hat"]
    ids = encoder.tokenizer.encode(captions).input_ids
    texts = encoder.encode_texts(captions, 2)
    np.testing.assert_allclose(texts, encoder.run("text", ids), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-5)

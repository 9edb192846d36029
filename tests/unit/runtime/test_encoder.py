from types import SimpleNamespace

import numpy as np
import pytest

from tests.helpers.refused import refused
from tests.helpers.toy_bundle import COLOURS, EMBED_DIM, draw_person
from upperson_rt.encoder import Encoder
from upperson_rt.errors import BackendError, InputError, IntegrityError, UsageError


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    return [draw_person(folder / f"{colour}.png", colour) for colour in COLOURS]


TEXTS = ["red", "a man in blue", "green coat", "a", "woman with the yellow coat", "black", "an"]


def test_rows_are_unit_vectors_in_order_whatever_the_batch(encoder, pictures):
    images = np.concatenate([encoder.encode_images([picture]) for picture in pictures])
    texts = np.concatenate([encoder.encode_texts([text]) for text in TEXTS])
    assert (images.shape, images.dtype) == ((len(pictures), EMBED_DIM), np.float32)
    for rows in (images, texts):
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    pixels = np.stack([encoder.prepare_image(picture) for picture in pictures])
    for batch_size in (4, 5, 100):
        steps = []
        embeds = encoder.encode_images(
            pictures, batch_size, lambda *step, to=steps: to.append(step)
        )
        np.testing.assert_allclose(embeds, images, atol=1e-6)
        assert steps[-1] == (len(pictures), len(pictures))
        assert len(steps) == -(-len(pictures) // batch_size)
        np.testing.assert_array_equal(encoder.encode_pixels(pixels, batch_size), embeds)
        np.testing.assert_allclose(encoder.encode_texts(TEXTS, batch_size), texts, atol=1e-6)


class Limited:
    """A backend such as a TensorRT engine: it refuses more rows than its profile has."""

    def __init__(self, backend, max_batch):
        self.name, self.version, self.device = backend.name, backend.version, backend.device
        self.max_batch, self.backend, self.sizes = max_batch, backend, []

    def run(self, inputs):
        (rows,) = inputs.values()
        if not 1 <= len(rows) <= self.max_batch:
            raise BackendError(f"a batch of {len(rows)} does not fit {self.max_batch}")
        self.sizes.append(len(rows))
        return self.backend.run(inputs)


@pytest.mark.parametrize(
    ("max_batch", "sizes"), [(4, [4, 3, 4]), (3, [3, 3, 1, 3, 1]), (16, [7, 4])]
)
def test_batches_are_split_to_what_a_backend_takes(encoder, max_batch, sizes):
    towers = {name: Limited(encoder.backend(name), max_batch) for name in ("image", "text")}
    limited = Encoder(encoder.manifest, "int8", encoder.tokenizer, towers.__getitem__)
    pixels = np.random.default_rng(0).integers(0, 256, (11, 24, 8, 3), dtype=np.uint8)
    embeds, expected = (one.encode_pixels(pixels, batch_size=7) for one in (limited, encoder))
    np.testing.assert_allclose(embeds, expected, atol=1e-6)
    assert towers["image"].sizes == sizes
    embeds, expected = (one.encode_texts(TEXTS) for one in (limited, encoder))
    np.testing.assert_allclose(embeds, expected, atol=1e-6)
    assert max(towers["text"].sizes) == min(max_batch, len(TEXTS))


def test_nothing_gives_nothing_and_bad_arguments_are_refused(encoder, pictures, tmp_path):
    assert encoder.encode_images([]).shape == encoder.encode_texts([]).shape == (0, EMBED_DIM)
    with refused("image_unreadable", InputError, path=str(tmp_path / "missing.png")):
        encoder.encode_images([*pictures, tmp_path / "missing.png"])
    for pixels in (np.zeros((1, 24, 8, 3), np.float32), np.zeros((1, 8, 24, 3), np.uint8)):
        with refused("pixels_unfit", InputError, found=f"{pixels.dtype} {pixels.shape}"):
            encoder.encode_pixels(pixels)
    with refused("out_of_range", InputError, what="batch_size"):
        encoder.encode_texts(["red"], batch_size=0)
    with refused("no_list", InputError, what="sentences"):
        encoder.encode_texts("red")
    with refused("choice_unknown", UsageError, what="channels"):
        encoder.encode_images(pictures, channels="hsv")
    for wrong, code in (
        (np.zeros((24, 8, 3), np.uint8), "no_picture_list"),
        ("picture.png", "no_picture_list"),
        ([None], "no_picture"),
        ([np.zeros((24, 8, 3), np.float32)], "array_unfit"),
        ([np.zeros((2, 24, 8, 3), np.uint8)], "array_unfit"),
    ):
        with refused(code, InputError):
            encoder.encode_images(wrong)
    # Useless output of a backend is never returned.
    for name, value, code in (
        ("image_embeds", np.nan, "embeds_unusable"),
        ("image_embeds", 0, "embeds_unusable"),
        ("embeddings", 1, "output_missing"),
    ):
        outputs = {name: np.full((2, EMBED_DIM), value, np.float32)}
        broken = SimpleNamespace(max_batch=None, run=lambda inputs, outputs=outputs: outputs)
        made = Encoder(encoder.manifest, "int8", encoder.tokenizer, {"image": broken}.get)
        with refused(code, IntegrityError, tower="image"):
            made.encode_pixels(np.zeros((2, 24, 8, 3), np.uint8))

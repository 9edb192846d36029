"""What a camera does to a picture: resolution, colours, exposure and noise."""

from __future__ import annotations

import numpy as np
from PIL import Image

from upperson.data.synthetic.look import Camera
from upperson.data.synthetic.sampling import between

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def photograph(
    image: Image.Image, camera: Camera, jitter: float, rng: np.random.Generator
) -> Image.Image:
    """Takes a picture of a scene.

    Args:
        image: The scene as an RGB image.
        camera: The camera; see `Camera` for what each setting does.
        jitter: Standard deviation of the exposure and the gains from shot to shot.
        rng: The random generator.

    Returns:
        A new RGB image of the same size.
    """
    width, height = image.size
    share = between(rng, camera.resolution)
    if share < 1.0:
        small = (max(8, round(width * share)), max(8, round(height * share)))
        image = image.resize(small, Image.Resampling.BILINEAR)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    # One 3 x 3 matrix and an offset hold every linear step, so that the pixels are visited once.
    drift = rng.normal(1.0, jitter, 4)
    gains = np.array(camera.gains) * drift[:3] * drift[3] * camera.exposure * camera.contrast
    colour = camera.saturation * np.eye(3) + (1.0 - camera.saturation) * np.tile(_LUMA, (3, 1))
    matrix = (colour * (1.0 - camera.haze) * gains[:, None]).astype(np.float32)
    offset = np.float32(128.0 * (1.0 - camera.contrast) * (1.0 - camera.haze) + 215.0 * camera.haze)
    pixels = np.asarray(image, dtype=np.float32) @ matrix.T + offset
    if camera.noise > 0:
        pixels += rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(camera.noise)
    return Image.fromarray(np.clip(pixels, 0.0, 255.0).astype(np.uint8))

"""Looks: the visual and textual domains a person can be shown in, and what cameras do.

A *look* fixes how people are photographed (cameras, framing, background) and how they are
described (caption style). The people themselves do not depend on it, but for the things of a
site, which is what makes it possible to pre-train on one look and fine-tune on the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from PIL import Image

from upperson_synthetic.people import SiteThing
from upperson_synthetic.sampling import between, chance

Background = Literal["studio", "street"]
CaptionStyle = Literal["list", "sentences"]

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Camera:
    """One camera of a look: what it does to the light that reaches it."""

    name: str  # In the annotations, such as cam3.
    gains: tuple[float, float, float] = (1.0, 1.0, 1.0)  # White balance of red, green and blue.
    exposure: float = 1.0  # Factor on the brightness.
    contrast: float = 1.0  # Factor on the distance from mid grey.
    saturation: float = 1.0  # Factor on the distance from the grey of equal brightness.
    haze: float = 0.0  # Share of veiling light added to the picture, 0..1.
    resolution: tuple[float, float] = (1.0, 1.0)  # Range of the share of pixels resolved per axis.
    noise: float = 1.0  # Standard deviation of the sensor noise, in grey levels of 0..255.
    tilt: tuple[float, float] = (0.0, 0.02)  # Range of the downward view; 0 is level, 0.3 high up.
    jpeg_quality: int = 92  # 1..95.


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """A domain: how people are photographed and described."""

    name: str  # Key in `LOOKS`.
    caption_style: CaptionStyle  # `list` is mostly telegraphic, `sentences` is full English.
    cameras: tuple[Camera, ...]  # The views of one person are spread over them.
    background: Background
    width: tuple[int, int]  # Smallest and largest width of a crop in pixels, both included.
    height: tuple[int, int]
    body: tuple[float, float]  # Range of the body's height as a share of the crop's.
    shift: float  # Largest displacement of the body as a share of the crop's size, per axis.
    roll: float  # Largest sideways lean of the camera, as horizontal shift per height.
    side_views: float  # Probability of a view from the side, not from the front or the back.
    back_views: float  # Probability of a view from behind among the others.
    light: tuple[float, float]  # Range of the brightness of the body's dark side; 1 is flat light.
    shadow: float  # Darkness of the shadow on the ground, 0..1.
    occluders: float  # Probability of an object in front of the feet.
    hidden_bags: float  # Probability that the bag is not visible in a view.
    light_jitter: float  # Standard deviation of the exposure and the gains from shot to shot.
    things: tuple[SiteThing, ...] = ()  # What only people of this site have.


SOURCE = Look(
    name="studio",
    caption_style="list",
    cameras=(
        Camera("cam1"),
        Camera("cam2", gains=(1.02, 1.0, 0.98), exposure=1.03),
        Camera("cam3", gains=(0.98, 1.0, 1.02), exposure=0.97),
    ),
    background="studio",
    width=(64, 64),
    height=(192, 192),
    body=(0.9, 0.95),
    shift=0.012,
    roll=0.01,
    side_views=0.3,
    back_views=0.35,
    light=(0.86, 1.0),
    shadow=0.25,
    occluders=0.0,
    hidden_bags=0.02,
    light_jitter=0.015,
)
"""Studio photographs with telegraphic captions: a part of what a base model is pre-trained on."""

TARGET = Look(
    name="street",
    caption_style="sentences",
    # Gains, exposure, contrast, saturation, haze, resolution, noise, tilt, JPEG quality.
    cameras=(
        Camera("cam1", (1.32, 1.0, 0.58), 0.82, 0.85, 0.75, 0.0, (0.5, 0.8), 4.5, (0.1, 0.26), 50),
        Camera("cam2", (0.66, 0.96, 1.36), 0.74, 0.9, 0.7, 0.0, (0.45, 0.7), 5.2, (0.2, 0.34), 45),
        Camera(
            "cam3", (0.84, 1.18, 0.74), 0.95, 0.75, 0.65, 0.14, (0.5, 0.8), 3.9, (0.0, 0.15), 55
        ),
        Camera("cam4", (1.18, 0.96, 0.78), 1.25, 1.1, 0.8, 0.0, (0.45, 0.75), 3.2, (0.05, 0.2), 50),
        Camera("cam5", (0.76, 0.96, 1.26), 0.66, 0.95, 0.75, 0.0, (0.5, 0.8), 6.5, (0.15, 0.3), 50),
    ),
    background="street",
    width=(52, 76),
    height=(160, 208),
    body=(0.74, 0.93),
    shift=0.045,
    roll=0.07,
    side_views=0.4,
    back_views=0.45,
    light=(0.5, 0.95),
    shadow=0.5,
    occluders=0.22,
    hidden_bags=0.1,
    light_jitter=0.06,
)
"""Street cameras with descriptions in sentences: what a model is fine-tuned and tested on."""

INDOOR = Look(
    name="indoor",
    caption_style="sentences",
    # Gains, exposure, contrast, saturation, haze, resolution, noise, tilt, JPEG quality.
    cameras=(
        Camera("cam1", (1.16, 1.0, 0.78), 0.9, 0.9, 0.85, 0.0, (0.6, 0.85), 3.0, (0.15, 0.32), 65),
        Camera("cam2", (0.9, 1.1, 0.92), 0.8, 0.85, 0.8, 0.0, (0.55, 0.8), 4.0, (0.1, 0.26), 60),
        Camera(
            "cam3", (0.86, 0.98, 1.14), 1.12, 0.95, 0.85, 0.06, (0.6, 0.9), 2.5, (0.2, 0.36), 65
        ),
    ),
    background="studio",
    width=(56, 72),
    height=(168, 200),
    body=(0.78, 0.94),
    shift=0.035,
    roll=0.04,
    side_views=0.35,
    back_views=0.5,
    light=(0.65, 0.98),
    shadow=0.35,
    occluders=0.1,
    hidden_bags=0.06,
    light_jitter=0.04,
)
"""Cameras in a hall, between the two: other people's data, to start from before one's own."""


def _cameras(
    saturation: float, exposure: float, noise: float, **changes: Any
) -> tuple[Camera, ...]:
    """Return the street's cameras in other light; factors on what they do, and new values."""
    return tuple(
        replace(
            camera,
            saturation=saturation * camera.saturation,
            exposure=exposure * camera.exposure,
            noise=noise * camera.noise,
            **changes,
        )
        for camera in TARGET.cameras
    )


NIGHT = replace(
    TARGET, name="night", cameras=_cameras(0.35, 0.6, 2.2, haze=0.25, resolution=(0.3, 0.45))
)
"""The street in the dark."""

LOW_RESOLUTION = replace(
    TARGET, name="low-resolution", cameras=_cameras(1.0, 1.0, 1.0, resolution=(0.14, 0.2))
)
"""The street from far away."""

HARD = replace(
    TARGET,
    name="hard",
    cameras=_cameras(0.45, 0.7, 2.0, haze=0.2, resolution=(0.2, 0.3)),
    occluders=0.5,
    body=(0.55, 0.75),
    shift=0.12,
)
"""The street in haze, with people who are half hidden and badly framed."""

STATION = replace(
    TARGET,
    name="station",
    # Sodium lamps at dusk, in haze.
    cameras=_cameras(0.45, 0.6, 1.2, gains=(1.6, 0.9, 0.35), haze=0.2, resolution=(0.35, 0.5)),
    occluders=0.35,
    things=(
        SiteThing("upper", "steward vest", 0.25, ("orange", "yellow", "green", "pink")),
        SiteThing("upper", "porter uniform", 0.2, ("red", "navy", "green", "purple")),
    ),
)
"""A site: a station at dusk, with stewards and porters."""

CAMPUS = replace(
    TARGET,
    name="campus",
    # Far away under fluorescent light, behind railings and bins.
    cameras=_cameras(0.4, 0.72, 1.0, gains=(0.42, 1.05, 1.7), haze=0.2, resolution=(0.28, 0.4)),
    occluders=0.5,
    things=(
        SiteThing("upper", "school blazer", 0.3, ("navy", "green", "red", "purple")),
        SiteThing("bag", "tote bag", 0.25, ("white", "yellow", "pink", "blue")),
    ),
)
"""A site: a campus seen from far away, with school uniforms and branded bags."""

SITES = (STATION, CAMPUS)
"""Looks whose cameras, garments and words no base was trained on."""

_GAINS = (0.65, 1.35)


def anywhere(rng: np.random.Generator) -> Look:
    """Draw a look with one camera, from all that cameras do.

    A base that has seen many of them is to a look's few cameras what CLIP is to a data set's: it
    has seen their like, and never them.
    """
    tilt = between(rng, (0.0, 0.32))
    resolution = between(rng, (0.45, 1.0))
    camera = Camera(
        name="cam1",
        gains=(between(rng, _GAINS), between(rng, _GAINS), between(rng, _GAINS)),
        exposure=between(rng, (0.65, 1.3)),
        contrast=between(rng, (0.75, 1.1)),
        saturation=between(rng, (0.6, 1.0)),
        haze=between(rng, (0.0, 0.15)) if chance(rng, 0.3) else 0.0,
        resolution=(resolution, resolution),
        noise=between(rng, (1.0, 6.0)),
        tilt=(tilt, tilt + 0.02),
        jpeg_quality=int(rng.integers(40, 93)),
    )
    return Look(
        name="anywhere",
        caption_style="list",
        cameras=(camera,),
        background="street" if chance(rng, 0.8) else "studio",
        width=(52, 76),
        height=(160, 208),
        body=(0.74, 0.95),
        shift=0.045,
        roll=0.07,
        side_views=0.35,
        back_views=0.42,
        light=(0.5, 1.0),
        shadow=0.4,
        occluders=0.15,
        hidden_bags=0.05,
        light_jitter=0.05,
    )


LOOKS: Mapping[str, Look] = {
    look.name: look for look in (SOURCE, INDOOR, TARGET, NIGHT, LOW_RESOLUTION, HARD, *SITES)
}


def photograph(
    image: Image.Image, camera: Camera, jitter: float, rng: np.random.Generator
) -> Image.Image:
    """Return an RGB scene as a camera sees it, in the same size.

    ``jitter`` is the standard deviation of the exposure and the gains from shot to shot.
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

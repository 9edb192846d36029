"""One picture: a person in a scene, lit, partly hidden and photographed."""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from upperson_synthetic.body import draw_legs, draw_upper
from upperson_synthetic.carried import draw_behind, draw_in_front
from upperson_synthetic.drawing import Pose, Sketch, mix, sample_pose, shade
from upperson_synthetic.head import draw_head
from upperson_synthetic.look import Camera, Look, photograph
from upperson_synthetic.people import COLOURS, Person, Rgb
from upperson_synthetic.sampling import between, chance

OVERSAMPLING = 2
"""Bodies are drawn this many times larger than the crop and scaled down, which smooths edges."""

_BACKDROPS: tuple[Rgb, ...] = ((206, 208, 210), (226, 226, 224), (190, 198, 208), (214, 206, 194))
_WALLS: tuple[Rgb, ...] = (
    (150, 134, 120),
    (122, 96, 82),
    (168, 164, 156),
    (104, 110, 116),
    (186, 172, 148),
    (92, 104, 92),
    (136, 146, 158),
)
_GROUNDS: tuple[Rgb, ...] = ((112, 112, 114), (142, 138, 130), (92, 94, 98), (160, 154, 146))
_DYES: tuple[Rgb, ...] = tuple(tint.rgb for tint in COLOURS.values())


def render_person(
    person: Person, look: Look, rng: np.random.Generator, camera: Camera | None = None
) -> Image.Image:
    """Return one view of a person as an RGB image; equal generators give equal pixels.

    JPEG artefacts are not part of it; they come with `encode_jpeg`. Without a camera it is one of
    the look's by chance.
    """
    if camera is None:
        camera = look.cameras[int(rng.integers(len(look.cameras)))]
    size = (
        int(rng.integers(look.width[0], look.width[1] + 1)),
        int(rng.integers(look.height[0], look.height[1] + 1)),
    )
    canvas = (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING)
    pose = sample_pose(person, look, camera, canvas, rng)
    scene = draw_studio(size, rng) if look.background == "studio" else draw_street(size, rng)
    feet = pose.flat(0.0, 1.0)
    half = 0.16 * pose.scale / OVERSAMPLING
    slant = between(rng, (-1.0, 1.0)) * look.shadow * half
    ground = (feet[0] / OVERSAMPLING, feet[1] / OVERSAMPLING - 1)
    draw_shadow(scene, ground, half, look.shadow, slant)
    body = draw_body(person, pose).reduce(OVERSAMPLING)
    lit = light_body(body, between(rng, look.light), 1 if chance(rng, 0.5) else -1)
    scene.paste(lit, mask=body.getchannel("A"))
    if chance(rng, look.occluders):
        draw_occluder(scene, rng)
    return photograph(scene, camera, look.light_jitter, rng)


def encode_jpeg(image: Image.Image, camera: Camera) -> bytes:
    """Return a picture as a JPEG file of the camera's quality."""
    buffer = io.BytesIO()
    # Every setting is written out, so that a change of Pillow's defaults changes no bytes.
    settings = {"subsampling": "4:2:0", "optimize": False, "progressive": False}
    image.save(buffer, format="JPEG", quality=camera.jpeg_quality, **settings)
    return buffer.getvalue()


def draw_body(person: Person, pose: Pose) -> Image.Image:
    """Draw a person on a transparent canvas of the pose's size; returns RGBA."""
    sketch = Sketch(Image.new("RGBA", (pose.width, pose.height)), person, pose)
    draw_behind(sketch)
    draw_legs(sketch)
    draw_upper(sketch)
    draw_in_front(sketch)
    draw_head(sketch)
    return sketch.image


def light_body(body: Image.Image, dark: float, side: int) -> Image.Image:
    """Shade a body from one side; returns RGB."""
    width = body.width
    ramp = np.linspace(dark, 1.0, width, dtype=np.float32)[::side]
    row = Image.fromarray((ramp * 255).astype(np.uint8)[None, :])
    veil = row.resize(body.size, Image.Resampling.NEAREST)
    black = Image.new("RGB", body.size)
    return Image.composite(body.convert("RGB"), black, veil)


# --- The scene


def draw_studio(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Paint a plain backdrop that meets a slightly darker floor, in RGB."""
    width, height = size
    colour = np.array(_BACKDROPS[int(rng.integers(len(_BACKDROPS)))], dtype=np.float32)
    rows = np.linspace(0.0, 1.0, height, dtype=np.float32)
    light = 1.02 - 0.06 * rows - 0.1 * np.clip((rows - 0.8) * 5, 0, 1)
    light *= between(rng, (0.94, 1.04))
    column = np.clip(light[:, None] * colour, 0, 255).astype(np.uint8)
    return Image.fromarray(np.repeat(column[:, None, :], width, axis=1))


def draw_street(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Paint a cluttered street, out of focus, in RGB."""
    width, height = size
    horizon = round(height * between(rng, (0.45, 0.8)))
    wall = _vary(_WALLS[int(rng.integers(len(_WALLS)))], rng)
    ground = _vary(_GROUNDS[int(rng.integers(len(_GROUNDS)))], rng)
    image = Image.new("RGB", size, wall)
    draw = ImageDraw.Draw(image)
    _draw_facade(draw, width, horizon, wall, rng)
    draw.rectangle((0, horizon, width, height), fill=ground)
    slope = between(rng, (-0.3, 0.3)) * width
    for share in (0.15, 0.5, 0.9):
        y = horizon + (height - horizon) * share
        tone = shade(ground, between(rng, (0.75, 1.25)))
        draw.line([(0, y - slope * 0.2), (width, y + slope * 0.2)], fill=tone, width=2)
    for _ in range(int(rng.integers(1, 4))):
        _draw_thing(draw, width, height, horizon, rng)
    return image.filter(ImageFilter.BoxBlur(1))


def draw_shadow(
    image: Image.Image, feet: tuple[float, float], half: float, darkness: float, slant: float
) -> None:
    """Darken the ground under the feet of an RGB picture, in place; all in pixels.

    ``feet`` is the point between the soles, ``half`` half the shadow's width, ``darkness`` 0 (none)
    to 1 (black), ``slant`` the sideways offset of the shadow's centre.
    """
    x, y = feet
    mask = Image.new("L", image.size)
    box = (x - half + slant, y - half * 0.22, x + half + slant, y + half * 0.22)
    ImageDraw.Draw(mask).ellipse(box, fill=round(255 * darkness))
    image.paste((12, 12, 16), mask=mask.filter(ImageFilter.BoxBlur(2)))


def draw_occluder(image: Image.Image, rng: np.random.Generator) -> None:
    """Put a railing, a bin, a bollard or a plant over the bottom edge, in place."""
    width, height = image.size
    draw = ImageDraw.Draw(image)
    top = height * between(rng, (0.8, 0.92))
    colour = _vary(((70, 76, 78), (54, 70, 58), (120, 116, 108))[int(rng.integers(3))], rng)
    kind = int(rng.integers(4))
    if kind == 0:
        draw.line([(0, top), (width, top + between(rng, (-4, 4)))], fill=colour, width=4)
        for x in range(int(rng.integers(8)), width, 11):
            draw.line([(x, top), (x, height)], fill=colour, width=2)
    elif kind == 1:
        left = width * between(rng, (-0.1, 0.7))
        right = left + 0.42 * width
        draw.rectangle((left, top, right, height), fill=colour)
        draw.rectangle((left - 1, top - 3, right + 1, top + 2), fill=shade(colour, 0.7))
    elif kind == 2:
        middle = width * between(rng, (0.1, 0.9))
        post = (middle - 5, top - 8, middle + 5, height + 8)
        draw.rounded_rectangle(post, radius=5, fill=colour)
        draw.rectangle((middle - 5, top, middle + 5, top + 4), fill=(214, 210, 200))
    else:
        leaf = _vary((58, 92, 50), rng)
        for _ in range(16):
            left, upper = width * between(rng, (-0.15, 1.0)), between(rng, (top, height))
            size = between(rng, (6, 16))
            tone = shade(leaf, between(rng, (0.7, 1.25)))
            draw.ellipse((left, upper, left + size, upper + size), fill=tone)


def _vary(colour: Rgb, rng: np.random.Generator) -> Rgb:
    return shade(colour, between(rng, (0.75, 1.25)))


def _draw_facade(
    draw: ImageDraw.ImageDraw, width: int, horizon: int, wall: Rgb, rng: np.random.Generator
) -> None:
    step = int(rng.integers(14, 30))
    offset = int(rng.integers(step))
    glass = mix(wall, (40, 50, 64) if chance(rng, 0.6) else (220, 224, 220), 0.7)
    style = int(rng.integers(3))
    if style == 0:
        for x in range(offset - step, width, step):
            for y in range(offset - step, horizon - 12, round(step * 1.4)):
                draw.rectangle((x, y, x + step * 0.55, y + step * 0.9), fill=glass)
    elif style == 1:
        for y in range(offset % 8, horizon, 8):
            draw.line([(0, y), (width, y)], fill=shade(wall, 0.86))
        sign = _DYES[int(rng.integers(len(_DYES)))]
        top = horizon * between(rng, (0.0, 0.4))
        draw.rectangle((0, top, width, top + 12), fill=mix(sign, wall, 0.3))
    else:
        edge = width * between(rng, (0.2, 0.8))
        draw.rectangle((edge, 0, width, horizon), fill=shade(wall, between(rng, (0.6, 1.3))))
        draw.line([(edge, 0), (edge, horizon)], fill=shade(wall, 0.5), width=2)


def _draw_thing(
    draw: ImageDraw.ImageDraw, width: int, height: int, horizon: int, rng: np.random.Generator
) -> None:
    kind = int(rng.integers(4))
    x = width * between(rng, (-0.1, 1.1))
    colour = mix(_DYES[int(rng.integers(len(_DYES)))], (110, 110, 110), 0.35)
    if kind == 0:  # a pole
        draw.rectangle((x - 2, 0, x + 2, horizon + 10), fill=(64, 66, 70))
    elif kind == 1:  # a parked car
        y = horizon + 4.0
        draw.rounded_rectangle((x - 26, y - 22, x + 26, y + 6), radius=6, fill=colour)
        draw.rectangle((x - 15, y - 19, x + 15, y - 10), fill=(52, 60, 70))
        for wheel in (-16, 16):
            draw.ellipse((x + wheel - 5, y, x + wheel + 5, y + 10), fill=(26, 26, 28))
    elif kind == 2:  # a tree
        draw.rectangle((x - 3, horizon * 0.5, x + 3, horizon + 6), fill=(80, 64, 50))
        y = horizon * between(rng, (0.1, 0.45))
        draw.ellipse((x - 20, y - 26, x + 20, y + 26), fill=_vary((74, 102, 62), rng))
    else:  # another person, far away at the edge of the crop
        x = -4.0 if x < width / 2 else width + 4.0
        y = height * between(rng, (0.3, 0.5))
        draw.ellipse((x - 5, y, x + 5, y + 12), fill=(150, 120, 100))
        draw.rounded_rectangle((x - 9, y + 12, x + 9, y + 50), radius=4, fill=colour)
        draw.rectangle((x - 7, y + 50, x + 7, y + 90), fill=shade(colour, 0.5))

"""Draws one view of a person in one look."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from upperson.data.synthetic.background import (
    draw_occluder,
    draw_shadow,
    draw_street,
    draw_studio,
)
from upperson.data.synthetic.camera import photograph
from upperson.data.synthetic.carried import draw_behind, draw_in_front
from upperson.data.synthetic.head import draw_head
from upperson.data.synthetic.legs import draw_legs
from upperson.data.synthetic.look import Camera, Look
from upperson.data.synthetic.people import Person
from upperson.data.synthetic.pose import Pose, sample_pose
from upperson.data.synthetic.sampling import between, chance
from upperson.data.synthetic.torso import draw_upper

#: Bodies are drawn this many times larger than the crop and scaled down, which smooths edges.
OVERSAMPLING = 2


def render_person(
    person: Person,
    look: Look,
    rng: np.random.Generator,
    camera: Camera | None = None,
) -> Image.Image:
    """Draws one view of a person.

    Args:
        person: Who is seen.
        look: The domain.
        rng: The random generator; equal generators give equal pixels.
        camera: The camera, or None to draw one of the look's.

    Returns:
        An RGB image whose size is within the look's bounds. JPEG artefacts are not part of it;
        they come with the encoding at `Camera.jpeg_quality`.
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


def draw_body(person: Person, pose: Pose) -> Image.Image:
    """Draws a person on a transparent canvas of the pose's size; returns RGBA."""
    image = Image.new("RGBA", (pose.width, pose.height))
    draw = ImageDraw.Draw(image)
    draw_behind(draw, person, pose)
    draw_legs(draw, person, pose)
    draw_upper(image, person, pose)
    draw_in_front(draw, person, pose)
    draw_head(draw, person, pose)
    return image


def light_body(body: Image.Image, dark: float, side: int) -> Image.Image:
    """Shades a body from one side; returns RGB."""
    width = body.width
    ramp = np.linspace(dark, 1.0, width, dtype=np.float32)[::side]
    row = Image.fromarray((ramp * 255).astype(np.uint8)[None, :])
    veil = row.resize(body.size, Image.Resampling.NEAREST)
    black = Image.new("RGB", body.size)
    return Image.composite(body.convert("RGB"), black, veil)

"""Head, hair, glasses, headwear and scarf."""

from PIL import Image

from upperson_synthetic.drawing import Point, Pose, Sketch, contrast, shade
from upperson_synthetic.people import COLOURS, HAIR_COLOURS, SKIN, Person, Rgb

_NECK_Y = 0.142


class _Head(Sketch):
    """A sketch with the head's own proportions: children have large heads."""

    def __init__(self, image: Image.Image, person: Person, pose: Pose) -> None:
        super().__init__(image, person, pose)
        self.grow = 1.4 if person.is_child else 1.06

    def place(self, across: float, y: float) -> Point:
        return self.pose.flat(across * self.grow, _NECK_Y + (y - _NECK_Y) * self.grow)


def draw_head(sketch: Sketch) -> None:
    """Draw the head over the trunk, with everything that is worn on it."""
    person, pose = sketch.person, sketch.pose
    head = _Head(sketch.image, person, pose)
    back = -pose.heading
    from_front = pose.facing > -0.3
    if person.headwear == "hood":
        _draw_hood(head, from_front)
        return
    hair = HAIR_COLOURS[person.hair_colour].rgb
    dark = shade(hair, 0.8)
    if person.accessory == "scarf" and not from_front:
        _draw_scarf(head)
    if person.hair_style == "long":
        _draw_long_hair(head, dark)
    if person.hair_style == "short" and person.is_female:
        _draw_bob(head, dark)
    if person.hair_style == "ponytail" and from_front:
        _draw_ponytail(head, back, dark)
    # From the front the hair ends above the jaw, or it would look like a headscarf.
    crown = (0.06, 0.062) if from_front else (0.07, 0.069)
    head.ellipse(back * 0.006, crown[0], 0.056, crown[1], hair)
    if person.hair_style == "bun":
        head.ellipse(back * 0.035, -0.006, 0.034, 0.03, dark)
    if from_front:
        _draw_face(head)
    elif person.hair_style == "short" and not person.is_female:
        head.ellipse(0.0, 0.128, 0.032, 0.016, shade(SKIN[person.skin], 0.88))
    if person.hair_style == "ponytail" and not from_front:
        _draw_ponytail(head, back, dark)
    if person.accessory == "scarf" and from_front:
        _draw_scarf(head)
    if person.headwear_colour is not None:
        _draw_headwear(head, COLOURS[person.headwear_colour].rgb)


def _draw_long_hair(head: _Head, colour: Rgb) -> None:
    facing, heading = head.pose.facing, head.pose.heading
    if facing > 0.35:
        # Two locks beside the neck; one piece below the chin would be a beard.
        for side in (-1, 1):
            lock = [(0.034, 0.06), (0.058, 0.06), (0.068, 0.2), (0.056, 0.235), (0.038, 0.21)]
            head.polygon([(side * x - heading * 0.02, y) for x, y in lock], colour)
        return
    narrow = 0.72 if abs(heading) > 0.7 else 1.0
    shift = -heading * 0.034
    fall = [(-0.056, 0.06), (0.056, 0.06), (0.066, 0.225), (-0.066, 0.225)]
    head.polygon([(x * narrow + shift, y) for x, y in fall], colour)
    head.ellipse(shift, 0.22, 0.066 * narrow, 0.024, colour)


def _draw_bob(head: _Head, colour: Rgb) -> None:
    # What is called short on a woman covers the ears and, from behind, the neck.
    shift = -head.pose.heading * 0.022
    half = 0.064 if head.pose.facing > 0.35 else 0.06
    head.polygon(
        [(shift + x, y) for x, y in ((-0.05, 0.05), (0.05, 0.05), (half, 0.138), (-half, 0.138))],
        colour,
    )


def _draw_face(head: _Head) -> None:
    person, facing, heading = head.person, head.pose.facing, head.pose.heading
    skin = SKIN[person.skin]
    centre = heading * 0.017
    half = 0.046 * (0.62 + 0.38 * max(0.0, facing))
    head.ellipse(centre, 0.083, half, 0.056, skin)
    if person.hair_style in {"long", "bun"} and facing > 0.4:
        # A parting: hair on both sides of the forehead.
        hair = HAIR_COLOURS[person.hair_colour].rgb
        head.polygon([(centre - half * 0.75, 0.038), (centre, 0.028), (centre - half, 0.08)], hair)
        head.polygon([(centre + half * 0.75, 0.038), (centre, 0.028), (centre + half, 0.08)], hair)
    if person.gender == "man":
        # Men are drawn with beards, since no other part of a face can be seen in a small crop.
        head.ellipse(
            centre, 0.112, half * 0.94, 0.03, shade(HAIR_COLOURS[person.hair_colour].rgb, 0.85)
        )
        head.ellipse(centre, 0.088, half * 0.8, 0.02, skin)
    dark = (30, 26, 28) if person.skin < 3 else (12, 10, 10)
    gap = 0.021 * max(0.0, facing)
    eyes = [heading * 0.036 - gap, heading * 0.036 + gap] if gap > 0.006 else [heading * 0.042]
    for eye in eyes:
        head.ellipse(eye, 0.076, 0.0065, 0.0065, dark)
    lips = (176, 42, 58) if person.gender == "woman" else shade(skin, 0.62)
    mouth = [(heading * 0.03 - 0.012, 0.112), (heading * 0.03 + 0.012, 0.112)]
    head.line(mouth, lips, 0.011 if person.gender == "woman" else 0.007)
    if person.glasses:
        for eye in eyes:
            head.ellipse(eye, 0.077, 0.0185, 0.0165, (20, 20, 24))
            head.ellipse(eye, 0.077, 0.0095, 0.0085, (150, 170, 186))
        head.line([(-heading * 0.03, 0.073), (eyes[-1], 0.073)], (20, 20, 24), 0.007)


def _draw_ponytail(head: _Head, back: float, colour: Rgb) -> None:
    # From the front only the end of it shows, beside the neck.
    root = back * 0.056
    end = back * 0.085 if abs(back) > 0.45 else (0.062 if head.pose.facing > 0 else 0.0)
    head.ellipse(root, 0.04, 0.024, 0.022, colour)
    head.polygon(
        [(root - 0.018, 0.04), (root + 0.018, 0.04), (end + 0.022, 0.19), (end - 0.022, 0.19)],
        colour,
    )
    head.ellipse(end, 0.19, 0.022, 0.028, colour)


def _draw_headwear(head: _Head, colour: Rgb) -> None:
    person, facing, heading = head.person, head.pose.facing, head.pose.heading
    dark = shade(colour, 0.75)
    dome = [(-0.06, 0.055), (-0.058, 0.02), (-0.036, -0.008), (0.0, -0.016)]
    dome += [(-x, y) for x, y in reversed(dome[:-1])]
    if person.headwear == "cap":
        head.polygon(dome, colour)
        if facing > -0.4:
            tip = heading * 0.085
            root = tip * 0.4
            brim = [(root - 0.052, 0.05), (root + 0.052, 0.05), (tip + 0.04, 0.066)]
            head.polygon([*brim, (tip - 0.04, 0.066)], contrast(colour, 0.4))
        head.ellipse(0.0, -0.014, 0.01, 0.007, dark)
    elif person.headwear == "beanie":
        head.polygon([(x, y - 0.016 if y < 0.04 else y) for x, y in dome], colour)
        head.line([(-0.06, 0.043), (0.06, 0.043)], dark, 0.026)
        head.ellipse(0.0, -0.036, 0.019, 0.018, contrast(colour, 0.4))
    else:
        head.polygon([(x * 0.95, y - 0.012 if y < 0.04 else y) for x, y in dome], colour)
        head.ellipse(0.0, 0.05, 0.102, 0.017, colour)
        head.line([(-0.056, 0.033), (0.056, 0.033)], contrast(colour, 0.6), 0.015)


def _draw_hood(head: _Head, from_front: bool) -> None:
    person = head.person
    colour = COLOURS[person.upper_colour].rgb
    back = -head.pose.heading
    head.ellipse(back * 0.012, 0.072, 0.073, 0.084, shade(colour, 0.92))
    head.polygon([(-0.073, 0.08), (0.073, 0.08), (0.085, 0.175), (-0.085, 0.175)], colour)
    if from_front:
        head.ellipse(head.pose.heading * 0.014, 0.08, 0.053, 0.066, shade(colour, 0.6))
        hair = HAIR_COLOURS[person.hair_colour].rgb
        head.ellipse(head.pose.heading * 0.015, 0.074, 0.047, 0.056, hair)
        if person.hair_style == "long":
            for side in (-1, 1):
                lock = [(0.03, 0.1), (0.055, 0.1), (0.05, 0.22), (0.03, 0.22)]
                head.polygon([(side * x, y) for x, y in lock], shade(hair, 0.8))
        _draw_face(head)
    if person.accessory == "scarf":
        _draw_scarf(head)


def _draw_scarf(head: _Head) -> None:
    if head.person.accessory_colour is None:
        return
    colour = COLOURS[head.person.accessory_colour].rgb
    head.polygon([(-0.062, 0.132), (0.062, 0.132), (0.072, 0.176), (-0.072, 0.176)], colour)
    head.line([(-0.064, 0.156), (0.064, 0.156)], contrast(colour, 0.35), 0.008)
    if head.pose.facing > -0.2:
        hang = 0.03 + head.pose.heading * 0.03
        corners = [(hang - 0.024, 0.17), (hang + 0.024, 0.17), (hang + 0.028, 0.32)]
        head.polygon([*corners, (hang - 0.022, 0.32)], shade(colour, 0.85))
        head.line([(hang - 0.022, 0.3), (hang + 0.028, 0.3)], contrast(colour, 0.4), 0.01)

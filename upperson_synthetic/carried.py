"""Things a person carries: bags, an umbrella, a phone."""

from upperson_synthetic.body import hand_position
from upperson_synthetic.drawing import Ring, Sketch, contrast, draw_disc, shade
from upperson_synthetic.people import COLOURS, Rgb


def draw_behind(sketch: Sketch) -> None:
    """Draw what the body hides in this view; call it before the body."""
    person, pose = sketch.person, sketch.pose
    if person.accessory == "umbrella" and person.accessory_colour is not None:
        _draw_canopy(sketch, COLOURS[person.accessory_colour].rgb)
    if person.bag_colour is None or not pose.bag_visible:
        return
    colour = COLOURS[person.bag_colour].rgb
    if person.bag == "backpack" and pose.nearness(0.0, -0.1) <= 0.0:
        _draw_backpack(sketch, colour)
    if person.bag == "suitcase":
        _draw_suitcase(sketch, colour)


def draw_in_front(sketch: Sketch) -> None:
    """Draw what hides the body in this view; call it after trunk and arms."""
    person, pose = sketch.person, sketch.pose
    if person.accessory == "phone":
        x, y = hand_position(sketch, pose.side)
        across, down = 0.014 * pose.scale, 0.032 * pose.scale
        box = (x - across, y - down, x + across, y + down * 0.6)
        sketch.draw.rounded_rectangle(box, radius=across * 0.5, fill=(22, 22, 26))
    if person.accessory == "umbrella":
        x, y = hand_position(sketch, pose.side)
        stick = [(x, y + 0.03 * pose.scale), (x, pose.flat(0.0, -0.05)[1])]
        sketch.stroke(stick, (60, 58, 58), 0.012, least_px=2)
    if person.bag_colour is None or not pose.bag_visible:
        return
    colour = COLOURS[person.bag_colour].rgb
    if person.bag == "backpack":
        if pose.nearness(0.0, -0.1) > 0.0:
            _draw_backpack(sketch, colour)
        elif pose.facing > 0.3:
            for side in (-1, 1):
                strap = [(side * 0.062, 0.168), (side * 0.068, 0.3), (side * 0.09, 0.38)]
                sketch.line(strap, shade(colour, 0.9), 0.026)
        else:
            half = pose.heading * 0.03
            sketch.line([(-half, 0.168), (half, 0.26), (-half, 0.37)], colour, 0.024)
    if person.bag == "handbag":
        _draw_handbag(sketch, colour)
    if person.bag == "shoulder bag":
        _draw_shoulder_bag(sketch, colour)
    if person.bag == "tote bag":
        _draw_tote_bag(sketch, colour)


def _free_side(sketch: Sketch) -> int:
    # The hand with an umbrella or a phone cannot hold a bag as well.
    side = sketch.pose.side
    return -side if sketch.person.accessory in {"umbrella", "phone"} else side


def _clamp(value: float, limit: float) -> float:
    return max(-limit, min(limit, value))


def _draw_backpack(sketch: Sketch, colour: Rgb) -> None:
    pose = sketch.pose
    centre = -0.105 * pose.heading
    rings = (
        Ring(0.17, 0.06, 0.03),
        Ring(0.195, 0.096, 0.055),
        Ring(0.4, 0.112, 0.066),
        Ring(0.43, 0.098, 0.055),
    )
    sketch.draw.polygon(pose.outline(rings, centre), fill=colour)
    mark = contrast(colour, 0.4)
    half = pose.half_width(0.086, 0.05)
    if pose.nearness(0.0, -0.1) > 0.0 or abs(pose.heading) > 0.6:
        pocket = [(centre - half, 0.31), (centre + half, 0.31)]
        pocket += [(centre + half, 0.41), (centre - half, 0.41)]
        sketch.polygon(pocket, shade(colour, 0.8))
        sketch.line(pocket[:2], mark, 0.01)
        sketch.line([(centre - half, 0.225), (centre + half, 0.225)], mark, 0.008)


def _draw_handbag(sketch: Sketch, colour: Rgb) -> None:
    hand_x, hand_y = hand_position(sketch, _free_side(sketch))
    unit = sketch.pose.scale
    margin = 0.062 * unit
    x = max(margin, min(sketch.pose.width - margin, hand_x))
    top = hand_y + 0.06 * unit
    handle = [(x - 0.035 * unit, top), (hand_x, hand_y), (x + 0.035 * unit, top)]
    sketch.stroke(handle, shade(colour, 0.8), 0.012, least_px=2)
    corners = [(-0.046, 0.0), (0.046, 0.0), (0.062, 0.1), (-0.062, 0.1)]
    sketch.draw.polygon([(x + dx * unit, top + dy * unit) for dx, dy in corners], fill=colour)
    flap = [(x - 0.05 * unit, top + 0.03 * unit), (x + 0.05 * unit, top + 0.03 * unit)]
    sketch.stroke(flap, contrast(colour, 0.4), 0.008)


def _draw_tote_bag(sketch: Sketch, colour: Rgb) -> None:
    """Draw a tall bag with two handles and a round mark."""
    hand_x, hand_y = hand_position(sketch, _free_side(sketch))
    unit = sketch.pose.scale
    half, height = 0.078 * unit, 0.2 * unit
    x = max(half, min(sketch.pose.width - half, hand_x))
    top = hand_y + 0.045 * unit
    for offset in (-0.02, 0.02):
        handle = [(x + (offset - 0.025) * unit, top), (hand_x, hand_y)]
        handle.append((x + (offset + 0.025) * unit, top))
        sketch.stroke(handle, shade(colour, 0.7), 0.01, least_px=2)
    sketch.draw.rectangle((x - half, top, x + half, top + height), fill=colour)
    mark = contrast(colour, 0.85)
    middle = (x, top + 0.55 * height)
    draw_disc(sketch.draw, middle, 0.05 * unit, mark)
    draw_disc(sketch.draw, middle, 0.022 * unit, colour)
    sketch.stroke([(x - half, top), (x + half, top)], mark, 0.014, least_px=2)


def _draw_shoulder_bag(sketch: Sketch, colour: Rgb) -> None:
    pose = sketch.pose
    side = pose.side
    hip = _clamp(side * 0.115 * pose.facing + 0.03 * pose.heading, 0.125)
    if abs(pose.facing) < 0.6:
        # From the side the bag hangs at the near hip, whichever that is.
        hip = -0.02 * pose.heading
    start = _clamp(-side * 0.06 * pose.facing, 0.06)
    sketch.line([(start, 0.165), (hip, 0.46)], shade(colour, 0.85), 0.018)
    corners = [(-0.062, 0.45), (0.062, 0.45), (0.066, 0.55), (-0.066, 0.55)]
    sketch.polygon([(hip + x, y) for x, y in corners], colour)
    lid = [(hip - 0.064, 0.495), (hip, 0.515), (hip + 0.064, 0.495)]
    sketch.line(lid, contrast(colour, 0.45), 0.01)


def _draw_suitcase(sketch: Sketch, colour: Rgb) -> None:
    pose, side = sketch.pose, _free_side(sketch)
    limit = 0.5 * pose.width / pose.scale - 0.06
    centre = _clamp(side * 0.17 * pose.facing - 0.16 * pose.heading, limit)
    bar = [hand_position(sketch, side), pose.flat(centre, 0.7)]
    sketch.stroke(bar, (70, 70, 74), 0.012, least_px=2)
    corners = [(-0.062, 0.69), (0.062, 0.69), (0.062, 0.955), (-0.062, 0.955)]
    sketch.polygon([(centre + x, y) for x, y in corners], colour)
    for offset in (-0.03, 0.0, 0.03):
        rib = [(centre + offset, 0.715), (centre + offset, 0.93)]
        sketch.line(rib, contrast(colour, 0.35), 0.008)
    for offset in (-0.042, 0.042):
        wheel = pose.flat(centre + offset, 0.968)
        draw_disc(sketch.draw, wheel, 0.016 * pose.scale, (30, 30, 32))


def _draw_canopy(sketch: Sketch, colour: Rgb) -> None:
    pose = sketch.pose
    # Over the head, pulled a little towards the hand that holds it.
    hand_x, _ = hand_position(sketch, pose.side)
    centre = (hand_x + 2 * pose.flat(0.0, 0.0)[0]) / 3
    unit = pose.scale
    rim = pose.flat(0.0, 0.035)[1]
    half, rise = 0.2 * unit, 0.17 * unit
    box = (centre - half, rim - rise, centre + half, rim + rise)
    sketch.draw.pieslice(box, 180, 360, fill=colour)
    for index in range(4):
        left = centre - half + index * half / 2
        scallop = (left, rim - 0.02 * unit, left + half / 2, rim + 0.02 * unit)
        sketch.draw.pieslice(scallop, 180, 360, fill=shade(colour, 0.7))
    peak = (centre, rim - rise)
    for share in (-0.5, 0.0, 0.5):
        sketch.stroke([peak, (centre + share * half, rim)], contrast(colour, 0.35), 0.007)

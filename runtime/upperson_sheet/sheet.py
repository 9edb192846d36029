"""A contact sheet: one picture that shows what a sentence found."""

import io
import math
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from upperson_phrases.evidence import Explanation
from upperson_rt.arguments import check_count, check_path
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.files import write_atomically
from upperson_rt.gallery import Hit, Item
from upperson_rt.gallery.crops import picture_file, use_picture
from upperson_rt.gallery.records import check_hits
from upperson_rt.printable import count_of, escape_for_display, local_time, show_percent
from upperson_rt.score_calibration import MatchLabel
from upperson_rt.search.service import SearchResult

_MARGIN = 48
_GAP = 24
_TILE_WIDTH = 220
_PICTURE_HEIGHT = 440
_CAPTION_HEIGHT = 92
_MOST_TILES = 500
_BAR_HEIGHT = 34
_MOST_BARS = 8
_TITLE_SIZES = (38, 30, 25)  # The first one with which the sentence fits its lines.
_TITLE_LINES = 3

_Colour: TypeAlias = tuple[int, int, int]
_PAPER = (255, 255, 255)
_MAT = (238, 240, 243)
_INK = (28, 32, 38)
_MUTED = (112, 120, 130)
_CHIP = (28, 32, 38)
_MISSING = (203, 207, 212)
_WANTED = (38, 120, 86)
_EXCLUDED = (190, 60, 50)
_WARNING = (200, 130, 20)
_VERDICTS: Mapping[str, _Colour] = {"likely": _WANTED, "possible": (29, 95, 191)}
_REMARK_SIZE = 18
_REMARK_HEIGHT = 26
_MOST_WARNINGS = 5
_READINGS = frozenset({"rewritten", "either", "excluded"})
"""Notices of how a sentence was read."""
_LONGEST_REMARK = 400


def save_sheet(
    path: str | os.PathLike[str],
    sentence: str,
    hits: Sequence[Hit],
    columns: int = 5,
    crops_dir: Path | None = None,
    explanation: Explanation | None = None,
    result: SearchResult | None = None,
) -> None:
    """Draw a contact sheet and write it as PNG, whole or not at all.

    Args:
        path: The PNG file; replaced if it exists.
        sentence: The query, shown on top.
        hits: In rank order; the first 500 are shown.
        columns: Tiles per row, at most.
        crops_dir: `Gallery.crops_dir`, where the saved pictures of cameras are.
        explanation: `Retriever.explain` of these hits: a bar for each phrase, eight at most. Bars
            of what must not be there are red.
        result: The search that found these hits: its verdict, how the sentence was read and
            warnings are written under it, likelihoods and labels below the pictures.
    """
    file = Path(check_path(path, "a contact sheet"))
    sheet = draw_sheet(sentence, hits, columns, crops_dir, explanation, result)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    write_atomically(file, buffer.getvalue())


def draw_sheet(
    sentence: str,
    hits: Sequence[Hit],
    columns: int = 5,
    crops_dir: Path | None = None,
    explanation: Explanation | None = None,
    result: SearchResult | None = None,
) -> Image.Image:
    """Draw a contact sheet: the sentence, then a tile per hit with rank, score, origin and bars.

    Arguments as of `save_sheet`.
    A picture that is missing or unreadable becomes a grey tile that says so. Pillow's own font is
    used; it has Latin letters only.
    """
    hits = check_hits(hits)
    if crops_dir is not None:
        crops_dir = Path(check_path(crops_dir, "the folder of crops"))
    shown = hits[:_MOST_TILES]
    bars = _bars(explanation, len(hits))
    likely = _likely(result, len(hits))
    columns = check_count(columns, "columns")
    columns = max(1, min(columns, len(shown)))
    rows = -(-len(shown) // columns)
    # A sheet of one or two tiles still needs room for its sentence.
    width = 2 * _MARGIN + max(3, columns) * (_TILE_WIDTH + _GAP) - _GAP
    if not isinstance(sentence, str):
        raise InputError(f"the title of a sheet must be a text, found {type(sentence).__name__}")
    # No letter is narrower than two pixels: what is cut off here would not fit anyway.
    words = [escape_for_display(word) for word in sentence[: _TITLE_LINES * width // 2].split()]
    for title_size in _TITLE_SIZES:
        title = _wrap(words, _font(title_size), width - 2 * _MARGIN)
        if len(title) <= _TITLE_LINES:
            break
    if len(title) > _TITLE_LINES:
        rest = " ".join(title[_TITLE_LINES - 1 :])
        last = _elide(rest, _font(title_size), width - 2 * _MARGIN, middle=False)
        title = [*title[: _TITLE_LINES - 1], last]
    line_height = round(title_size * 1.25)
    remarks = _remarks(result, width - 2 * _MARGIN - 14)
    remarks_top = _MARGIN + len(title) * line_height + 8
    top = remarks_top + len(remarks) * _REMARK_HEIGHT + (12 if remarks else 0)
    tiles_top = top + 22 + _GAP + 8
    tile_height = _PICTURE_HEIGHT + _CAPTION_HEIGHT + (len(bars[0]) * _BAR_HEIGHT if bars else 0)
    height = tiles_top + (rows * (tile_height + _GAP) - _GAP if rows else 0) + _MARGIN - 12

    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(title):
        draw.text((_MARGIN, _MARGIN - 8 + i * line_height), line, font=_font(title_size), fill=_INK)
    for i, (line, colour) in enumerate(remarks):
        y = remarks_top + i * _REMARK_HEIGHT
        draw.rectangle((_MARGIN, y, _MARGIN + 4, y + _REMARK_HEIGHT - 1), fill=colour)
        draw.text((_MARGIN + 14, y + 2), line, font=_font(_REMARK_SIZE), fill=_INK)
    by_track = all(hit.span is not None for hit in hits)
    count = count_of(len(hits), "track" if by_track else "picture") if hits else "no pictures"
    note = f"{count}, best match first" if len(hits) > 1 else f"{count} found"
    if len(shown) < len(hits):
        note += f"; the first {len(shown)} are shown"
    draw.text((_MARGIN, top), note, font=_font(20), fill=_MUTED)
    for i, hit in enumerate(shown):
        x = _MARGIN + (i % columns) * (_TILE_WIDTH + _GAP)
        y = tiles_top + (i // columns) * (tile_height + _GAP)
        _draw_tile(sheet, draw, x, y, i + 1, hit, crops_dir, likely[i] if likely else None)
        for row, bar in enumerate(bars[i] if bars else ()):
            top = y + _PICTURE_HEIGHT + _CAPTION_HEIGHT + row * _BAR_HEIGHT
            _draw_bar(draw, x, top, bar)
    return sheet


def _remarks(result: SearchResult | None, width: int) -> list[tuple[str, _Colour]]:
    """Return lines for the verdict, how the sentence was read, and warnings; with a colour each."""
    if result is None:
        return []
    notices = result.notices_beside_verdict
    texts = [(one.text, _MUTED) for one in notices if one.code in _READINGS]
    texts += [(one.text, _WARNING) for one in notices if one.is_warning][:_MOST_WARNINGS]
    if result.verdict is not None:
        texts.insert(0, (result.verdict.text, _VERDICTS.get(result.verdict.word, _MUTED)))
    font = _font(_REMARK_SIZE)
    return [
        (line, colour)
        for text, colour in texts
        for line in _wrap(f"{text[:1].upper()}{text[1:_LONGEST_REMARK]}".split(), font, width)
    ]


def _likely(result: SearchResult | None, hits: int) -> list[tuple[MatchLabel, float | None]]:
    """Return label and likelihood of each hit; nothing for a search without a verdict."""
    if result is None:
        return []
    if (count := len(result.hits)) != hits:
        message = f"the result has {count} hits, the sheet {hits}"
        raise InputError(message, code="result_unfit")
    if result.verdict is None:
        return []
    return list(zip(result.labels, result.likelihoods, strict=True))


_Bar: TypeAlias = tuple[str, float, bool]
"""Phrase, evidence 0 to 1 or NaN, and whether it must not be there."""


def _bars(explanation: Explanation | None, hits: int) -> list[list[_Bar]]:
    if explanation is None:
        return []
    if (count := len(explanation.evidence_HP)) != hits:
        message = f"the explanation is of {count} hits, the sheet of {hits}"
        raise InputError(message, code="explanation_unfit")
    shown = [
        (f"{phrase.text} (excluded)" if phrase.negated else phrase.text, phrase.negated)
        for phrase in explanation.phrases[:_MOST_BARS]
    ]
    return [
        [(text, float(value), negated) for (text, negated), value in zip(shown, row, strict=False)]
        for row in explanation.evidence_HP
    ]


def _draw_bar(draw: ImageDraw.ImageDraw, x: int, y: int, bar: _Bar) -> None:
    """Draw a phrase over a line of the tile's width that is full where the evidence is 1."""
    text, value, negated = bar
    font = _font(15)
    number = "" if math.isnan(value) else f"{value:.2f}"
    room = _TILE_WIDTH - round(font.getlength("0.00")) - 10
    draw.text((x, y), _elide(text, font, room, middle=False), font=font, fill=_INK)
    draw.text((x + _TILE_WIDTH, y), number, font=font, fill=_MUTED, anchor="ra")
    line = y + 20
    draw.rectangle((x, line, x + _TILE_WIDTH - 1, line + 5), fill=_MAT)
    filled = 0 if math.isnan(value) else round(value * _TILE_WIDTH)
    if filled:
        draw.rectangle((x, line, x + filled - 1, line + 5), fill=_EXCLUDED if negated else _WANTED)


def _draw_tile(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    x: int,
    y: int,
    rank: int,
    hit: Hit,
    crops_dir: Path | None,
    likely: tuple[MatchLabel, float | None] | None,
) -> None:
    frame = (x, y, x + _TILE_WIDTH - 1, y + _PICTURE_HEIGHT - 1)
    picture = picture_of(hit.item, crops_dir)
    if isinstance(picture, Image.Image):
        draw.rectangle(frame, fill=_MAT)
        fitted = ImageOps.contain(picture, (_TILE_WIDTH, _PICTURE_HEIGHT), Image.Resampling.LANCZOS)
        corner = (x + (_TILE_WIDTH - fitted.width) // 2, y + (_PICTURE_HEIGHT - fitted.height) // 2)
        sheet.paste(fitted, corner)
    else:
        draw.rectangle(frame, fill=_MISSING)
        middle = (x + _TILE_WIDTH // 2, y + _PICTURE_HEIGHT // 2)
        draw.text(middle, picture, font=_font(20), fill=_INK, anchor="mm", align="center")

    number = str(rank)
    chip_width = max(36, round(_font(21).getlength(number)) + 20)
    draw.rectangle((x, y, x + chip_width - 1, y + 35), fill=_CHIP)
    draw.text((x + chip_width / 2, y + 18), number, font=_font(21), fill=_PAPER, anchor="mm")

    item = hit.item
    text_y = y + _PICTURE_HEIGHT + 10
    name = Path(item.crop or item.source or item.key).name
    first, size, colour = f"{hit.score:.3f}", 24, _INK
    if likely is not None and likely[1] is not None:
        name = f"{first}  {name}"
        first, size = f"{likely[0]} {show_percent(likely[1])}", 20
        colour = _VERDICTS.get(likely[0], _MUTED)
    draw.text((x, text_y), first, font=_font(size), fill=colour)
    if item.camera:
        room = _TILE_WIDTH - round(_font(size).getlength(first)) - 12
        camera = _elide(item.camera, _font(18), room)
        draw.text((x + _TILE_WIDTH, text_y + 5), camera, font=_font(18), fill=_INK, anchor="ra")
    small = _font(17)
    lines = [local_time(item.time)] if item.time is not None else []
    lines.append(name)
    for i, line in enumerate(lines):
        at = (x, text_y + 33 + i * 24)
        draw.text(at, _elide(line, small, _TILE_WIDTH), font=small, fill=_MUTED)


def picture_of(item: Item, crops_dir: Path | None) -> Image.Image | str:
    """Return the picture of an item, cut to its box, or a word on why there is none."""
    file = picture_file(item, crops_dir)
    if file is None:
        return "picture\nis missing"
    is_saved = False
    if crops_dir is not None and item.crop is not None:
        is_saved = file == (crops_dir / item.crop).absolute()
    try:
        pixels = use_picture(file, np.ascontiguousarray)
    except IntegrityError:
        return "picture\nwas altered"
    except InputError:
        return "picture is\nunreadable"  # In the tile, so that the other hits are shown.
    if item.box is not None and not is_saved:
        x0, y0, x1, y1 = item.box
        pixels = np.ascontiguousarray(pixels[max(0, y0) : max(0, y1), max(0, x0) : max(0, x1)])
    return Image.fromarray(pixels) if pixels.size else "box lies out\nof the picture"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _wrap(
    words: list[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[str]:
    """Break words into lines that fit; a word that is wider than a line is shortened."""
    lines: list[str] = []
    while words:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        lines.append(_elide(" ".join(words[:count]), font, width, middle=False))
        words = words[count:]
    return lines


def _elide(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, middle: bool = True
) -> str:
    """Shorten text to a width; in the middle, file names keep their number and suffix."""
    text = escape_for_display(text)
    if len(text) <= width and font.getlength(text) <= width:
        return text

    def short(keep: int) -> str:
        head = (keep + 1) // 2 if middle else keep
        return f"{text[:head].rstrip()}...{text[len(text) - keep + head :]}"

    # By halves: names may be very long.
    fits, too_long = 0, min(len(text), width)
    while too_long - fits > 1:
        keep = (fits + too_long) // 2
        if font.getlength(short(keep)) <= width:
            fits = keep
        else:
            too_long = keep
    return short(fits)

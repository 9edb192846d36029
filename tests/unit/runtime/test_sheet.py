"""The contact sheet that shows what a sentence found."""

import numpy as np
import pytest
from PIL import Image

from tests.helpers.refused import refused
from upperson_phrases import parse
from upperson_phrases.evidence import Explanation
from upperson_rt.errors import InputError
from upperson_rt.gallery import Hit, Item
from upperson_rt.search.notices import Notice
from upperson_rt.search.service import SearchResult
from upperson_rt.search.verdict import Verdict
from upperson_sheet import sheet
from upperson_sheet.sheet import draw_sheet, save_sheet


def hit(id, source, **fields):
    return Hit(id=id, score=0.5, item=Item(key=f"k{id}", source=source, **fields))


def test_sheet_shows_pictures_and_missing_ones(tmp_path):
    red = tmp_path / "red.png"
    Image.new("RGB", (60, 180), (255, 0, 0)).save(red)
    broken = tmp_path / "broken.png"
    broken.write_bytes(red.read_bytes()[:60])
    hits = [
        hit(1, str(red), camera="gate", time=1764000000.0),
        hit(2, str(tmp_path / "gone.png")),
        hit(3, str(broken)),
        hit(4, str(red), box=(0, 0, 30, 30)),
        hit(5, str(red), box=(100, 0, 130, 30)),
        hit(6, "x" * 300, time=1e300),
    ]
    path = tmp_path / "out" / "sheet.png"
    save_sheet(path, "a woman in red\n" * 40, hits, columns=3)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    is_red = (pixels[..., 0] > 240) & (pixels[..., 1] < 15) & (pixels[..., 2] < 15)
    # Two of the six tiles are red: one of 1:3, one square cut to its box.
    assert is_red.sum() == pytest.approx(147 * 440 + 220 * 220, rel=0.05)
    assert [entry.name for entry in path.parent.iterdir()] == ["sheet.png"]


def test_sheet_prefers_the_saved_picture(tmp_path):
    Image.new("RGB", (60, 120), (255, 0, 0)).save(tmp_path / "frame.png")
    (tmp_path / "crops").mkdir()
    Image.new("RGB", (30, 60), (0, 0, 255)).save(tmp_path / "crops" / "1.png")
    frame = str(tmp_path / "frame.png")
    saved = hit(1, frame, box=(0, 0, 30, 30), crop="1.png")
    lost = hit(2, frame, box=(0, 0, 60, 120), crop="gone.png")

    def share(colour, *hits):
        pixels = np.asarray(draw_sheet("red", hits, crops_dir=tmp_path / "crops"))
        return (pixels == colour).all(axis=-1).sum()

    assert share((0, 0, 255), saved) == pytest.approx(220 * 440, rel=0.02)
    assert share((255, 0, 0), saved) == 0
    assert share((255, 0, 0), lost) == pytest.approx(220 * 440, rel=0.02)


def test_sizes_of_sheets(monkeypatch):
    none = draw_sheet("red", [])
    item = Item(key="k" * 300_000, camera="c" * 300_000)
    for title in ("x" * 300_000, "red " * 100_000):  # Cut in no time.
        long = draw_sheet(title, [Hit(id=1, score=0.5, item=item)])
        assert (long.width, long.height < 900) == (none.width, True)
    assert sheet._MOST_TILES == 500
    monkeypatch.setattr(sheet, "_MOST_TILES", 20)  # Drawing takes its time.
    hits = [hit(i, None) for i in range(200)]
    assert draw_sheet("red", hits[:20], 10).size == draw_sheet("red", hits, 10).size


@pytest.mark.parametrize("word", ["likely", "uncalibrated"])
def test_a_sheet_shows_verdict_likelihoods_and_warnings(monkeypatch, word):
    drawn = []
    draw = sheet.ImageDraw.ImageDraw.text

    def noted(self, at, text, **more):
        drawn.append(text)
        draw(self, at, text, **more)

    monkeypatch.setattr(sheet.ImageDraw.ImageDraw, "text", noted)
    is_likely = word == "likely"
    if is_likely:
        verdict = Verdict(word=word, likelihood=0.9, expected=2.0)
        judged = {"labels": ["likely", "unlikely"], "likelihoods": [0.871, 0.002]}
    else:
        verdict = Verdict(word=word, likelihood=None, expected=None, reason="no_calibration")
        judged = {"labels": ["", ""], "likelihoods": [None, None]}
    hits = [hit(1, None, camera="gate"), hit(2, "b.png")]
    notices = [Notice("words_unknown", {"words": ["zebra"]}), Notice("not_understood")]
    notices.append(Notice("rewritten", {"sentence": "woman in red"}))
    found = SearchResult(
        hits=hits, parsed=None, verdict=verdict, explanation=None, notices=notices, **judged
    )
    plain = draw_sheet("red", hits)
    drawn.clear()
    made = draw_sheet("red", hits, result=found)
    shown = " ".join(drawn).lower()
    assert verdict.text.split()[0] in shown
    assert found.notices[0].text.lower() in shown
    assert found.notices[1].text not in shown  # Notes are left to the command,
    assert found.notices[2].text in shown  # but for how the sentence was read.
    assert ("likely 87 %" in drawn, "unlikely < 1 %" in drawn) == (is_likely, is_likely)
    assert ("0.500" in drawn) != is_likely
    assert ("0.500  b.png" in drawn) == is_likely
    assert made.height > plain.height
    with refused("result_unfit", InputError):
        draw_sheet("red", hits[:1], result=found)


def test_a_bar_a_phrase(tmp_path):
    parsed = parse("red coat, no hat, blue jeans")
    evidence = np.array([[1.0, 0.5, 0.0], [0.25, 1.0, np.nan]], np.float32)
    found = Explanation(parsed=parsed, phrases=parsed.phrases, evidence_HP=evidence)
    hits = [hit(1, None), hit(2, None)]
    pixels = np.asarray(draw_sheet("red coat", hits, explanation=found))

    def bars(colour):
        rows = (pixels == colour).all(axis=-1)
        return rows[rows.any(axis=1)].sum(axis=1)

    # Two tiles beside each other, six pixels high: 100 % and 25 %, 50 % and 100 %, nothing.
    assert bars(sheet._WANTED).tolist() == [220 + 55] * 6
    assert bars(sheet._EXCLUDED).tolist() == [110 + 220] * 6
    assert len(pixels) == draw_sheet("red coat", hits).height + 3 * sheet._BAR_HEIGHT
    with refused("explanation_unfit", InputError):
        draw_sheet("red coat", hits[:1], explanation=found)
    (tmp_path / "file").touch()
    with refused("cannot_write", InputError):
        save_sheet(tmp_path / "file" / "sheet.png", "red", [])

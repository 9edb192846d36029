"""What the demo measures on a site, and how it is shown."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.helpers.refused import refused
from upperson.cli.demo_run import gains
from upperson.data.records import read_dataset
from upperson.demo_figures import FIGURES, measure, searched_split
from upperson.demo_page import MODELS, draw_sites, site_rows, street_rows
from upperson_synthetic import LOOKS, SyntheticSpec, write_dataset


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """Test people of the station."""
    spec = SyntheticSpec(look="station", train_ids=0, val_ids=0, test_ids=16, views=2, seed=3)
    folder = write_dataset(tmp_path_factory.mktemp("people") / "station", spec)
    return searched_split(read_dataset("jsonl", folder)["test"], LOOKS["station"])


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def scores(searched, *, right=True):
    """A model that knows each person, and either every query's pictures or none."""
    people = sorted({record.pid for record in searched.records})
    row = {pid: index for index, pid in enumerate(people)}
    image_GE = unit(np.eye(len(people))[[row[record.pid] for record in searched.records]])
    captions = np.repeat(image_GE, [len(record.captions) for record in searched.records], axis=0)
    queries = {**searched.short, **searched.own}

    def embed(texts):
        wanted = [queries[text] if right else ~queries[text] for text in texts]
        return unit(np.stack([image_GE[has_G].mean(axis=0) for has_G in wanted]))

    return measure(searched, captions, image_GE, embed)


def test_queries_have_the_sites_words_and_the_truth(searched):
    assert searched.own
    for queries in (searched.short, searched.own):
        for text, right_G in queries.items():
            found = [r for r, right in zip(searched.records, right_G, strict=True) if right]
            assert found, text
            for record in found:
                assert text.startswith(f"{record.attributes['gender']} in ")
                assert record.attributes["upper_colour"] in text
    for text in searched.own:
        assert text.split(maxsplit=3)[3] in {
            "steward vest", "marshal vest", "porter uniform", "bellhop uniform",
        }  # fmt: skip
    plain = searched_split(searched.records, LOOKS["street"])
    assert not plain.own
    assert list(plain.short) == list(searched.short)


def test_figures_and_gains(searched):
    good, bad = scores(searched), scores(searched, right=False)
    assert list(good.figures()) == list(FIGURES)
    assert good.figures() == dict.fromkeys(FIGURES, pytest.approx(100))
    assert bad.figures()["own_words"] < 50
    gained = gains(good, bad)
    for name in FIGURES:
        gain = gained[name]
        points = good.figures()[name] - bad.figures()[name]
        assert gain["points"] == pytest.approx(points)
        assert gain["low"] <= gain["points"] <= gain["high"]
    assert gained["R@1"] == {"points": 0, "low": 0, "high": 0}
    assert gained["own_words"]["low"] > 0
    plain = searched_split(searched.records, LOOKS["street"])
    assert list(scores(plain).figures()) == list(FIGURES[:3])


def test_tables_and_picture_show_the_summary(searched):
    good, bad = scores(searched), scores(searched, right=False)
    site = {key: good.figures() for key in MODELS} | {
        "base": bad.figures(),
        "gains": {key: gains(good, bad) for key in MODELS if key != "base"},
        "things": ["steward vest"],
    }
    head, base, *rows = site_rows(site)
    assert len(head) == 1 + len(FIGURES)
    assert base[4] == f"{bad.figures()['own_words']:.1f}"
    gain = site["gains"]["int8"]["own_words"]
    shown = "{points:+.1f}, {low:+.1f} to {high:+.1f}".format(**gain)
    assert [row[4] for row in rows] == [f"100.0 ({shown})"] * 4
    street = {
        "base": bad.figures(),
        "int8": good.figures(),
        "adapters": {"station": good.figures()},
        "sdm_recipes": {"station": bad.figures()},
        "gains": {
            "int8": gains(good, bad),
            "adapters": {"station": gains(good, bad)},
            "sdm_recipes": {"station": gains(bad, bad)},
        },
    }
    assert [row[0] for row in street_rows(street)[1:]] == [
        "frozen base", "frozen base, int8", "adapter, station", "SDM recipe of the paper, station",
    ]  # fmt: skip
    with Image.open(io.BytesIO(draw_sites({"sites": {"station": site, "campus": site}}))) as image:
        assert image.format == "PNG"
        assert image.width > 600


def test_people_without_attributes_are_refused(searched):
    bare = [replace(record, attributes=None) for record in searched.records]
    with refused("attributes_missing"):
        searched_split(bare, LOOKS["station"])

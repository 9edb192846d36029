"""Choosing calibration samples: coverage, hashes, determinism."""

import numpy as np
import pytest
from PIL import Image

from tests.helpers.refused import refused
from upperson.data.vocabulary import clip_tokenizer
from upperson_calibration.samples import (
    CANDIDATES_PER_SAMPLE,
    Captions,
    Pictures,
    choose_samples,
    cover,
)
from upperson_rt.errors import InputError
from upperson_rt.tokenizer import token_lengths


def save_images(folder, colours):
    files = []
    for index, colour in enumerate(colours):
        files.append(folder / f"{index}.png")
        Image.new("RGB", (10, 20), colour).save(files[-1])
    return files


def choose(files, texts, count, seed=0, cameras=None, **options):
    return choose_samples(
        Pictures(files=files, source="folder crops", cameras=cameras),
        Captions(texts=texts, source="people, train"),
        clip_tokenizer(),
        height_px=8,
        width_px=4,
        count=count,
        seed=seed,
        **options,
    )


TEXTS = [f"a person with {index} bags and a hat" for index in range(30)]


def test_equal_seeds_give_equal_samples_without_repetition(tmp_path):
    files = save_images(tmp_path, [(index * 8, 0, 0) for index in range(30)])
    first, again, other = (choose(files, TEXTS, 6, seed) for seed in (0, 0, 1))
    assert first.images.shape == (6, 8, 4, 3)
    assert len({image.tobytes() for image in first.images}) == 6
    assert len({ids.tobytes() for ids in first.input_ids}) == 6
    assert first.image_sha256 == again.image_sha256 != other.image_sha256
    assert first.text_sha256 == again.text_sha256 != other.text_sha256
    assert (first.image_source, first.text_source) == ("folder crops", "people, train")


@pytest.mark.parametrize("seed", range(2))
def test_the_darkest_the_reddest_and_the_longest_are_always_chosen(tmp_path, seed):
    rng = np.random.default_rng(seed)
    colours = [tuple(map(int, rng.integers(90, 130, 3))) for _ in range(80)]
    dark, red, long = 17, 44, 5
    colours[dark], colours[red] = (1, 1, 1), (255, 90, 90)
    texts = [*TEXTS[:long], "a man in " + "very " * 40 + "red", *TEXTS[long:]]
    files = save_images(tmp_path, colours)
    chosen = choose(files, texts, 12, seed)
    means = chosen.images.reshape(12, -1, 3).mean(axis=1)
    assert (means < 5).all(axis=1).sum() == 1
    assert (means[:, 0] == 255).sum() == 1
    assert token_lengths(chosen.input_ids).max() == 46


def test_every_camera_is_seen(tmp_path):
    files = save_images(tmp_path, [(100, 100, 100)] * 40)
    cameras = ["gate"] * 38 + ["roof", "hall"]
    features = np.zeros((40, 6))
    rows = cover(features, 8, np.random.default_rng(0), cameras)
    assert {cameras[row] for row in rows} == {"gate", "roof", "hall"}
    assert len(choose(files, TEXTS, 8, cameras=cameras).images) == 8


def test_coverage_spans_tails_and_keeps_the_distribution():
    """Against a random draw: both tails always, and quartiles as good."""
    values = np.random.default_rng(3).lognormal(size=(5000, 1))
    for seed in range(10):
        rng = np.random.default_rng(seed)
        chosen = values[cover(values, 64, rng), 0]
        assert chosen.min() == values.min()
        assert chosen.max() == values.max()
        quartiles = np.quantile(chosen, [0.25, 0.5, 0.75])
        np.testing.assert_allclose(quartiles, np.quantile(values, [0.25, 0.5, 0.75]), rtol=0.05)
    # Fewer than all extremes is still the count.
    rows = cover(np.random.default_rng(0).normal(size=(50, 6)), 3, np.random.default_rng(0))
    assert len(set(rows.tolist())) == 3


def test_large_sets_are_thinned_before_they_are_decoded(tmp_path):
    files, calls = save_images(tmp_path, [(50, 50, 50)] * 4), []
    choose(files * 10, ["a"], 2, progress=lambda *call: calls.append(call))
    assert calls[-1] == (2 * CANDIDATES_PER_SAMPLE, 2 * CANDIDATES_PER_SAMPLE)


def test_hashes_name_single_samples_and_ignore_padding(tmp_path):
    files = save_images(tmp_path, [(0, 0, 0), (9, 9, 9)])
    short = choose(files, ["a man"], 5)
    both = choose(files, ["a man", "a man in a blue coat"], 5)
    assert short.image_sha256 == both.image_sha256
    assert len(set(short.image_sha256)) == 2
    assert short.text_sha256[0] in both.text_sha256
    # A zero inside a sentence is no padding.
    ids = np.array([[5, 0, 9, 0, 0], [5, 7, 0, 3, 9], [9, 0, 0, 0, 0]], np.int32)
    assert token_lengths(ids).tolist() == [3, 5, 1]


def test_a_larger_count_takes_all_and_none_or_a_broken_picture_is_refused(tmp_path):
    files = save_images(tmp_path, [(index, 0, 0) for index in range(6)])
    everything = choose(files, TEXTS[:9], 100)
    assert (len(everything.images), len(everything.input_ids)) == (6, 9)
    with refused("no_samples", InputError, images=0, texts=1):
        choose([], ["a"], 1)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"bad\.png"):
        choose([tmp_path / "bad.png"], ["a"], 1)

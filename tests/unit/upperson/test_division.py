"""The clean/noisy division of training pairs."""

from dataclasses import replace

import numpy as np
import pytest

from tests.helpers.toy_run import Recorder, toy_config
from upperson.division import matching_losses, noisy_pairs
from upperson.train import train


def unit(rng, *shape):
    rows = rng.normal(size=shape)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_two_overlapping_gaussians_are_divided():
    rng = np.random.default_rng(1)
    clean, noisy = rng.normal(2, 1.5, 800), rng.normal(12, 2, 200)
    losses = np.concatenate([clean, noisy, [-8.0]])
    found = noisy_pairs(losses)
    wrong = set(found) ^ set(range(800, 1000))
    assert len(wrong) <= 5
    assert 1000 not in found, "a loss far below all others is of a right pair"


@pytest.mark.parametrize("losses", [[], [3.0], [1.0] * 5])
def test_losses_that_are_all_equal_accuse_nobody(losses):
    assert noisy_pairs(np.array(losses)).tolist() == []


def test_a_pair_loses_as_much_as_goes_to_other_people():
    rng = np.random.default_rng(2)
    text, image = unit(rng, 5, 8), unit(rng, 5, 8)
    pids = np.array([7, 9, 7, 4, 4])
    found = matching_losses(text, image, pids, batch_size=5, temperature=0.02, seed=[0])
    for i in range(5):
        expected = 0.0
        for query, gallery in ((text[i], image), (image[i], text)):
            weights = np.exp(gallery @ query / 0.02)
            expected -= np.log(weights[pids == pids[i]].sum() / weights.sum())
        assert found[i] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_captions_of_somebody_else_are_found_and_left_out(tmp_path, monkeypatch):
    """Of 30 people who each look like their caption six get another one's."""
    people = unit(np.random.default_rng(3), 30, 16)
    text = np.concatenate([people[[1, 2, 3, 4, 5, 0]], people[6:]])
    found = noisy_pairs(matching_losses(text, people, np.arange(30), 15, 0.02, [0]))
    assert found.tolist() == [0, 1, 2, 3, 4, 5]

    recorder = Recorder()
    config = replace(toy_config(tmp_path, monkeypatch, epochs=3), leave_out_noisy=True)
    train(config, tmp_path / "run", recorder)
    notes = [note for note in recorder.notes if "left out as noisy" in note]
    assert [note.split(":")[0] for note in notes] == ["epoch 2", "epoch 3"]
    header, *rows = (tmp_path / "run/metrics.csv").read_text("utf-8").splitlines()
    column = header.split(",").index("left out")
    left_out = [row.split(",")[column] for row in rows]
    assert left_out == ["0", *(note.split()[2] for note in notes)]
    assert 0 < int(left_out[1]) < 24

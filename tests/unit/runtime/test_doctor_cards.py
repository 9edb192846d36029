"""`doctor`'s test cards: a model that works passes them, random weights do not."""

import re

import numpy as np

from upperson_doctor.cards import _COLOURS, check_cards


class Knowing:
    """Embeds coats and sentences by colour, and by stripes if it knows them."""

    def __init__(self, knows_stripes):
        self._knows_stripes = knows_stripes

    def encode_texts(self, sentences):
        rows = []
        for sentence in sentences:
            (name,) = [name for name in _COLOURS if re.search(rf"\b{name}\b", sentence)]
            kind = 1.0 if "striped" in sentence else -1.0 if "plain" in sentence else 0.0
            rows.append(self._row(np.array(_COLOURS[name]), kind))
        return np.array(rows, np.float32)

    def encode_images(self, pictures):
        coats = [picture[96:190, 60] for picture in pictures]
        colours = [np.median(coat, axis=0) for coat in coats]
        stripes = [1.0 if coat.std(axis=0).max() > 20 else -1.0 for coat in coats]
        return np.array([self._row(*pair) for pair in zip(colours, stripes, strict=True)])

    def _row(self, colour, striped):
        return np.array([*(colour / 255 - 0.5), striped * self._knows_stripes], np.float32)


class Random(Knowing):
    def __init__(self, seed):
        self._rng = np.random.default_rng(seed)

    def encode_texts(self, sentences):
        return self._rng.normal(size=(len(sentences), 64)).astype(np.float32)

    encode_images = encode_texts


def test_a_model_that_knows_colours_and_stripes_passes_and_one_without_stripes_is_warned_of():
    check = check_cards(Knowing(1.0))
    assert (check.status, check.facts["stripes_right"], check.exit_code) == ("ok", 4, 0)
    assert check.facts["p_value"] < 0.001
    check = check_cards(Knowing(0.0))
    assert (check.status, check.facts["stripes_right"]) == ("warn", 0)


def test_random_weights_fail():
    """p is uniform for them: 1 in 1,000 is expected not to fail."""
    checks = [check_cards(Random(seed)) for seed in range(20)]
    assert {(check.status, check.exit_code) for check in checks} == {("fail", 3)}

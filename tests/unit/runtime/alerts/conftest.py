"""Galleries whose pictures have chosen scores for a sentence."""

import numpy as np
import pytest

from tests.helpers.alert_kills import START, vectors_of
from upperson_rt.gallery import Gallery, Item
from upperson_rt.ingest.service import Crop, Ingest

_PIXELS = np.zeros((24, 8, 3), np.uint8)


class World:
    """A gallery, and rows for it whose scores for `SENTENCE` are chosen."""

    def __init__(self, encoder, gallery):
        self.encoder, self.gallery = encoder, gallery
        self.rng = np.random.default_rng(0)
        self._made = 0
        self._ingest = None

    def vectors(self, scores):
        """Return unit vectors with these cosines."""
        return vectors_of(self.encoder, np.asarray(scores, np.float64), self.rng)

    def items(self, count, days=1.0, camera="gate", track=True, start=START):
        """Return items of as many visits, evenly over so many days."""
        first, self._made = self._made, self._made + count
        return [
            Item(
                key=f"p{first + n}",
                camera=camera,
                time=start + n * days * 86400 / count,
                track=f"t{first + n}" if track else None,
            )
            for n in range(count)
        ]

    def add(self, scores, **options):
        """Add rows without alerts being compared with them."""
        self.gallery.add(self.items(len(scores), **options), self.vectors(scores))

    def commit(self, items, scores, size=None):
        """Commit rows as `index` and `watch` do, so many at a time."""
        if self._ingest is None:
            self._ingest = Ingest(self.encoder, self.gallery)
        size = size or len(items)
        for at in range(0, len(items), size):
            crops = [Crop(item=item, pixels=_PIXELS) for item in items[at : at + size]]
            self._ingest.commit(crops, self.vectors(scores[at : at + size]))

    def visit(self, *scores, **options):
        """Commit a picture of a new visit for each score, together."""
        self.commit(self.items(len(scores), **options), scores)

    def restart(self):
        """Compare with a new process's matcher from now on."""
        self._ingest = None

    def messages(self, **where):
        with self.gallery.outbox() as outbox:
            return outbox.messages(**where)


@pytest.fixture
def world(encoder, gallery):
    return World(encoder, gallery)


@pytest.fixture
def place(tmp_path, encoder):
    """Makes more galleries."""
    opened = []

    def make(name):
        folder = tmp_path / name
        store = Gallery.open(folder, encoder.fingerprint, encoder.embed_dim, create=True)
        opened.append(store)
        return World(encoder, store)

    yield make
    for store in opened:
        store.close()

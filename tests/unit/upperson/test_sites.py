"""Sites: looks with cameras, garments, bags and words that no base was trained on."""

import dataclasses
import hashlib
import re
from itertools import chain

import numpy as np
import pytest
import torch

from upperson.model.base import load_base
from upperson_synthetic import LOOKS, SyntheticSpec, describe, generate_people
from upperson_synthetic.captions import brief
from upperson_synthetic.dataset import _views
from upperson_synthetic.look import SITES, SOURCE
from upperson_synthetic.people import TABLES, is_consistent, sample_look_alikes, sample_people
from upperson_synthetic.scene import render_person

LOOKS_BEFORE_SITES = {
    "studio": "9177ab6fde40627e", "indoor": "26a8480f8c3ef5db", "street": "b854fde5d0a880f7",
    "night": "b90dc2fdb84fbd50", "low-resolution": "fe7f4a6488524dd3", "hard": "c4dbe4e783e07a2b",
}  # fmt: skip
"""How SHA-256 of 16 JPEG files with their captions and people began before there were sites."""


@pytest.mark.parametrize("look", LOOKS_BEFORE_SITES)
def test_sites_leave_the_other_looks_as_they_were(look):
    spec = SyntheticSpec(look=look, train_ids=2, val_ids=2, test_ids=4, views=2, seed=11)
    digest = hashlib.sha256()
    for view in chain.from_iterable(_views(spec, split) for split in ("test", "val", "train")):
        digest.update(view.jpeg)
        digest.update("\n".join(view.captions).encode())
        digest.update(repr(view.person).encode())
    assert digest.hexdigest()[:16] == LOOKS_BEFORE_SITES[look]


def words_of(things):
    """The words of garments and bags of sites, without *bag*, which all looks have."""
    texts = [text for thing in things for text in TABLES[thing.field][thing.value].words]
    return {word for text in texts for word in text.split()} - {"bag"}


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.name)
def test_a_site_has_people_in_things_and_words_of_its_own(site):
    spec = SyntheticSpec(look=site.name, train_ids=300, val_ids=20, test_ids=300, views=1)
    test, train = generate_people(spec, "test"), generate_people(spec, "train")
    everyone = [*test, *generate_people(spec, "val"), *train]
    assert all(is_consistent(person) for person in everyone)
    assert len({dataclasses.replace(person, skin=0) for person in everyone}) == 620
    street = generate_people(dataclasses.replace(spec, look="street"), "test")
    assert sum(person == other for person, other in zip(test, street, strict=True)) / 300 > 0.4
    rng = np.random.default_rng(12)
    for thing in site.things:
        having = [person for person in test if getattr(person, thing.field) == thing.value]
        assert abs(len(having) / 300 - thing.share) < 0.08
        colours = {getattr(person, f"{thing.field}_colour") for person in having}
        assert colours == {*thing.colours}
        assert not [p for p in street if getattr(p, thing.field) == thing.value]
        captions = " ".join(describe(person, site, rng) for person in having for _ in range(8))
        assert all(word in captions for word in words_of([thing]))
        # The picture differs from that of the same person in a coat, or with a handbag.
        other = {"upper": "coat", "bag": "handbag"}[thing.field]
        for person in having[:5]:
            plain = dataclasses.replace(person, **{thing.field: other})
            first, second = (
                render_person(p, SOURCE, np.random.default_rng(8)) for p in (person, plain)
            )
            assert first.tobytes() != second.tobytes()


def test_no_base_has_seen_the_words_of_a_site():
    words = words_of([thing for site in SITES for thing in site.things])
    assert {"steward", "vest", "blazer", "porter", "uniform", "branded", "tote"} < words
    values = {thing.value for site in SITES for thing in site.things}
    rng = np.random.default_rng(13)
    people = sample_people(1500, rng)
    assert not values & {value for person in people for value in (person.upper, person.bag)}
    people += sample_look_alikes(1500, rng)
    assert not values & {value for person in people for value in (person.upper, person.bag)}
    looks = [LOOKS[name] for name in ("studio", "street", "indoor")]
    texts = [describe(person, look, rng) for person in people for look in looks]
    texts += [brief(person, rng).text for person in people]
    found = {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}
    assert not found & words
    base = load_base("upperson-small", None)
    tokens = base.tokenizer().encode([" ".join(sorted(words))]).input_ids[0]
    seen = base.clip.token_embedding.weight[torch.from_numpy(tokens.astype(np.int64))].any(dim=1)
    assert seen[0]
    assert seen[-1]
    assert not seen[1:-1].any()

"""Losses against their formulas, written entry by entry."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.refused import refused
from upperson.losses import (
    LOSSES,
    Objective,
    asdm_loss,
    cmpm_loss,
    id_loss,
    itc_loss,
    loss_names,
    same_identity,
    sdm_loss,
    tal_loss,
    wrong_caption_loss,
)
from upperson_rt.errors import UsageError

LABELS = torch.tensor([0, 1, 0, 2, 2])
FITS = torch.zeros(5, 5, dtype=torch.bool)
FITS[1, 3] = FITS[4, 0] = True  # Texts that also describe somebody else; not the other way round.
RIGHT = same_identity(LABELS) | FITS


FEATURES = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(3)) * 2
UNIT = F.normalize(FEATURES, dim=-1)


def both_ways(image, text):
    """Every query with its gallery and what is right in it."""
    for queries, gallery, right in ((text, image, RIGHT), (image, text, RIGHT.T)):
        for query, row in zip(queries, right, strict=True):
            yield query, gallery, row


def objective(*names, tau=0.02):
    """The value of an objective; the classifier of ``id`` is always the same."""
    torch.manual_seed(0)
    return Objective(names, 6, 3, tau)(*FEATURES, LABELS, FITS).item()


def divergence(logits, right):
    p, q = logits.softmax(0).tolist(), (right.float() / right.sum()).tolist()
    return sum(a * (math.log(a) - math.log(b + 1e-8)) for a, b in zip(p, q, strict=True))


def kl_both_ways(rows, image, text):
    found = [divergence(rows(query, all_), right) for query, all_, right in both_ways(image, text)]
    return sum(found) / len(image)


@pytest.mark.parametrize("tau", [0.02, 0.05])
def test_sdm_and_its_target_of_what_a_text_fits(tau):
    expected = kl_both_ways(lambda query, gallery: gallery @ query / tau, *UNIT)
    assert sdm_loss(*UNIT, RIGHT, tau).item() == pytest.approx(expected, rel=1e-5)
    assert objective("sdm", tau=tau) == pytest.approx(expected, rel=1e-5)
    assert sdm_loss(*UNIT, RIGHT.T, tau).item() != pytest.approx(expected, rel=1e-3)


def test_asdm_weighs_a_row_by_how_far_its_best_match_is_ahead():
    expected, wrong = 0.0, 0
    for query, gallery, right in both_ways(*UNIT):
        cosines = gallery @ query
        gap = max(cosines.tolist()) - max(cosines[right].tolist())
        wrong += gap > 0
        expected += (1 + 10 * gap) * divergence(cosines / 0.02, right) / len(LABELS)
    assert 0 < wrong < 2 * len(LABELS)
    assert asdm_loss(*UNIT, RIGHT).item() == pytest.approx(expected, rel=1e-5)


def test_tal_keeps_a_margin_to_the_soft_maximum_of_other_people():
    image, text = (x.clone().requires_grad_() for x in UNIT)
    expected, met = image.new_zeros(()), 0
    for query, gallery, right in both_ways(image, text):
        cosines = gallery @ query
        positive = (cosines[right].detach() / 0.015).softmax(0) @ cosines[right]
        negative = 0.015 * (cosines[~right] / 0.015).logsumexp(0)
        cost = 0.1 - positive + negative
        met += cost.item() <= 0
        expected = expected + cost.clamp(min=0)
    assert 0 < met < 2 * len(LABELS)
    found = tal_loss(image, text, RIGHT)
    torch.testing.assert_close(found, expected)
    # The weights of right items are constants.
    torch.testing.assert_close(
        torch.autograd.grad(found, (image, text)),
        torch.autograd.grad(expected, (image, text)),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_batch_of_one_person_gives_no_loss_and_no_gradient():
    image = F.normalize(torch.randn(3, 6), dim=-1).requires_grad_()
    for loss in (tal_loss, asdm_loss):
        value = loss(image, image.detach(), torch.ones(3, 3, dtype=torch.bool))
        (gradient,) = torch.autograd.grad(value, image)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()
    assert tal_loss(image, image, torch.ones(3, 3, dtype=torch.bool)).item() == 0


@pytest.mark.parametrize(("loss", "learned"), [("sdm", 0.0), ("asdm", 1.0), ("tal", 1.0)])
def test_a_start_that_is_saturated_at_wrong_answers_is_left(loss, learned):
    # Cosines are spread wide and every best match is wrong, as on a base with a low logit scale.
    generator = torch.Generator().manual_seed(0)
    text = F.normalize(torch.randn(32, 64, generator=generator), dim=-1)
    near = 0.05 * torch.randn(32, 64, generator=generator)
    image = (text.roll(1, dims=0) + near).requires_grad_()
    labels, objective = torch.arange(32), Objective((loss,), 64, 32)
    optimizer = torch.optim.Adam([image], lr=1e-2, eps=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        objective(image, text, labels).backward()
        optimizer.step()
    right = (image @ text.T).argmax(dim=1) == labels
    assert right.float().mean().item() == learned


def test_cmpm_projects_a_feature_with_its_length_on_unit_ones():
    expected = kl_both_ways(
        lambda query, gallery: gallery @ query / gallery.norm(dim=-1), *FEATURES
    )
    assert cmpm_loss(*FEATURES, RIGHT).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tau", [0.02, 0.05])
def test_itc_has_the_own_partner_as_only_target(tau):
    expected = 0.0
    for row, (query, gallery, _) in enumerate(both_ways(*UNIT)):
        logits = gallery @ query / tau
        expected += (logits.logsumexp(0) - logits[row % 5]).item() / (2 * len(LABELS))
    assert itc_loss(*UNIT, tau).item() == pytest.approx(expected, rel=1e-5)
    assert objective("itc", tau=tau) == pytest.approx(expected, rel=1e-5)


def test_id_classifies_both_modalities_with_one_classifier():
    torch.manual_seed(0)
    classifier = Objective(("id",), 6, 3).classifier
    assert classifier is not None
    assert classifier.weight.std().item() == pytest.approx(0.001, rel=0.5)
    assert classifier.bias.abs().max().item() == 0
    torch.nn.init.normal_(classifier.weight)
    expected = 0.0
    for x in FEATURES:
        log_p = (x @ classifier.weight.T + classifier.bias).log_softmax(1)
        expected -= log_p[torch.arange(len(LABELS)), LABELS].mean().item() / 2
    assert id_loss(classifier, *FEATURES, LABELS).item() == pytest.approx(expected, rel=1e-5)


def test_an_objective_is_the_sum_of_its_losses_and_a_text_that_fits_others_counts_in_three():
    for name, loss in (("sdm", sdm_loss), ("asdm", asdm_loss), ("tal", tal_loss)):
        assert objective(name) == pytest.approx(loss(*UNIT, RIGHT).item(), rel=1e-5)
    for name in ("itc", "cmpm"):
        assert objective(name) == Objective((name,), 6, 3)(*FEATURES, LABELS).item()
    parts = [objective(name) for name in LOSSES]
    assert objective(*LOSSES) == pytest.approx(sum(parts), rel=1e-6)
    assert len({round(part, 3) for part in parts}) == len(LOSSES)


@pytest.mark.parametrize("text", ["sdn", "sdm+", "", "sdm+id+sdm"])
def test_a_bad_list_of_losses_is_refused(text):
    with refused("loss_repeated" if text.count("sdm") > 1 else "loss_unknown", UsageError):
        loss_names(text)


@pytest.mark.parametrize("tau", [0.02, 0.05])
def test_wrong_captions_push_their_image_away(tau):
    generator = torch.Generator().manual_seed(3)
    image_NE, text_NE, wrong_NE = torch.randn(3, 5, 4, generator=generator).requires_grad_()
    unit_3NE = [F.normalize(features, dim=1) for features in (image_NE, text_NE, wrong_NE)]
    expected = 0.0
    for image, text, wrong in zip(*(unit.detach() for unit in unit_3NE), strict=True):
        expected += math.log(1 + math.exp((image @ wrong - image @ text) / tau)) / 5
    loss = wrong_caption_loss(image_NE, text_NE, wrong_NE, tau)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    (gradient,) = torch.autograd.grad(loss, wrong_NE)
    assert wrong_caption_loss(image_NE, text_NE, wrong_NE - 0.01 * gradient, tau) < loss

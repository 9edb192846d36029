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


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(3)
    image, text = torch.randn(2, len(LABELS), 6, generator=generator) * 2
    return image, text


@pytest.fixture
def unit(features):
    image, text = (F.normalize(x, dim=-1) for x in features)
    return image, text


def both_ways(image, text):
    """Every query with its gallery and what is right in it."""
    for queries, gallery, right in ((text, image, RIGHT), (image, text, RIGHT.T)):
        yield from ((query, gallery, row) for query, row in zip(queries, right, strict=True))


def divergence(logits, right):
    p, q = logits.softmax(0).tolist(), (right.float() / right.sum()).tolist()
    return sum(a * (math.log(a) - math.log(b + 1e-8)) for a, b in zip(p, q, strict=True))


def kl_both_ways(rows, image, text):
    found = [divergence(rows(query, all_), right) for query, all_, right in both_ways(image, text)]
    return sum(found) / len(image)


def test_sdm_and_its_target_of_what_a_text_fits(features, unit):
    for tau in (0.02, 0.05):
        expected = kl_both_ways(lambda query, gallery, tau=tau: gallery @ query / tau, *unit)
        assert sdm_loss(*unit, RIGHT, tau).item() == pytest.approx(expected, rel=1e-5)
        found = Objective(("sdm",), 6, 3, tau)(*features, LABELS, FITS)
        assert found.item() == pytest.approx(expected, rel=1e-5)
        assert sdm_loss(*unit, RIGHT.T, tau).item() != pytest.approx(expected, rel=1e-3)


def test_asdm_weighs_a_row_by_how_far_its_best_match_is_ahead(unit):
    expected, wrong = 0.0, 0
    for query, gallery, right in both_ways(*unit):
        cosines = gallery @ query
        gap = max(cosines.tolist()) - max(cosines[right].tolist())
        wrong += gap > 0
        expected += (1 + 10 * gap) * divergence(cosines / 0.02, right) / len(LABELS)
    assert 0 < wrong < 2 * len(LABELS)
    assert asdm_loss(*unit, RIGHT).item() == pytest.approx(expected, rel=1e-5)


def test_tal_keeps_a_margin_to_the_soft_maximum_of_other_people(
    unit,
):
    image, text = (x.requires_grad_() for x in unit)
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


def test_a_text_that_fits_others_is_right_for_them_in_three_losses(features, unit):
    for name, loss in (("sdm", sdm_loss), ("asdm", asdm_loss), ("tal", tal_loss)):
        found = Objective((name,), 6, 3)(*features, LABELS, FITS).item()
        assert found == pytest.approx(loss(*unit, RIGHT).item(), rel=1e-5)
    for name in ("itc", "cmpm"):
        objective = Objective((name,), 6, 3)
        assert objective(*features, LABELS, FITS).item() == objective(*features, LABELS).item()


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
    """Cosines spread wide and every best match wrong, as on a base with a low logit scale."""
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


def test_cmpm_projects_a_feature_with_its_length_on_unit_ones(
    features,
):
    expected = kl_both_ways(
        lambda query, gallery: gallery @ query / gallery.norm(dim=-1), *features
    )
    assert cmpm_loss(*features, RIGHT).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tau", [0.02, 0.05])
def test_itc_has_the_own_partner_as_only_target(features, unit, tau):
    expected = 0.0
    for row, (query, gallery, _) in enumerate(both_ways(*unit)):
        logits = gallery @ query / tau
        expected += (logits.logsumexp(0) - logits[row % 5]).item() / (2 * len(LABELS))
    assert itc_loss(*unit, tau).item() == pytest.approx(expected, rel=1e-5)
    found = Objective(("itc",), 6, 3, tau)(*features, LABELS)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_id_classifies_both_modalities_with_one_classifier(
    features,
):
    torch.manual_seed(0)
    classifier = Objective(("id",), 6, 3).classifier
    assert classifier is not None
    assert classifier.weight.std().item() == pytest.approx(0.001, rel=0.5)
    assert classifier.bias.abs().max().item() == 0
    torch.nn.init.normal_(classifier.weight)
    expected = 0.0
    for x in features:
        logits = x @ classifier.weight.T + classifier.bias
        picked = logits[torch.arange(len(LABELS)), LABELS]
        expected += (logits.logsumexp(1) - picked).mean().item() / 2
    assert id_loss(classifier, *features, LABELS).item() == pytest.approx(expected, rel=1e-5)


def test_an_objective_is_the_sum_of_its_losses(features):
    torch.manual_seed(0)
    parts = []
    for name in LOSSES:
        torch.manual_seed(0)
        parts.append(Objective((name,), 6, 3)(*features, LABELS).item())
    torch.manual_seed(0)
    together = Objective(LOSSES, 6, 3)(*features, LABELS).item()
    assert together == pytest.approx(sum(parts), rel=1e-6)
    assert len({round(part, 3) for part in parts}) == len(LOSSES)


def test_sdm_and_itc_do_not_see_the_length_of_features(features):
    image, text = features
    objective = Objective(("sdm", "itc"), 6, 3)
    assert objective(image * 3, text, LABELS).item() == pytest.approx(
        objective(image, text, LABELS).item(), rel=1e-5
    )


@pytest.mark.parametrize("text", ["sdn", "sdm+", "", "sdm+id+sdm"])
def test_a_bad_list_of_losses_is_refused(text):
    with refused("loss_repeated" if text.count("sdm") > 1 else "loss_unknown", UsageError):
        loss_names(text)


def test_wrong_captions_push_their_image_away():
    generator = torch.Generator().manual_seed(3)
    image_NE, text_NE, wrong_NE = (
        torch.randn(5, 4, generator=generator).requires_grad_() for _ in range(3)
    )
    unit_3NE = [F.normalize(features, dim=1) for features in (image_NE, text_NE, wrong_NE)]
    expected = 0.0
    for image, text, wrong in zip(*(unit.tolist() for unit in unit_3NE), strict=True):
        right = sum(a * b for a, b in zip(image, text, strict=True))
        false = sum(a * b for a, b in zip(image, wrong, strict=True))
        expected += math.log(1 + math.exp((false - right) / 0.02)) / 5
    loss = wrong_caption_loss(image_NE, text_NE, wrong_NE)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert text_NE.grad is not None
    assert wrong_NE.grad is not None
    moved = wrong_caption_loss(image_NE, text_NE, wrong_NE - 0.01 * wrong_NE.grad)
    assert moved < loss
    # A caption that could not be made false.
    same_NE = text_NE.detach().clone().requires_grad_()
    image_NE.grad = None
    wrong_caption_loss(image_NE, same_NE, same_NE).backward()
    assert image_NE.grad is not None
    assert image_NE.grad.abs().max() == 0
    assert same_NE.grad is not None
    assert same_NE.grad.abs().max() < 1e-6
    warm = wrong_caption_loss(image_NE, text_NE, wrong_NE, 0.05)
    lead_N = (unit_3NE[0] * (unit_3NE[1] - unit_3NE[2])).sum(dim=1)
    assert warm.item() == pytest.approx(F.softplus(-lead_N / 0.05).mean().item(), rel=1e-5)

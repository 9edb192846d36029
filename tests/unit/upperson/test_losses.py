"""Losses against their formulas, written entry by entry."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

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
SAME = same_identity(LABELS)


@pytest.fixture
def features() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    image, text = torch.randn(2, len(LABELS), 6, generator=generator) * 2
    return image, text


def kl_both_ways(rows: Callable[[Tensor, Tensor], Tensor], image: Tensor, text: Tensor) -> float:
    total = 0.0
    for queries, gallery in ((text, image), (image, text)):
        for i, query in enumerate(queries):
            p = rows(query, gallery).softmax(0)
            same = (LABELS[i] == LABELS).float()
            for p_ij, q_ij in zip(p.tolist(), (same / same.sum()).tolist(), strict=True):
                total += p_ij * (math.log(p_ij) - math.log(q_ij + 1e-8)) / len(queries)
    return total


def test_sdm(features: tuple[Tensor, Tensor]) -> None:
    image, text = (F.normalize(x, dim=-1) for x in features)
    expected = kl_both_ways(lambda query, gallery: gallery @ query / 0.02, image, text)
    assert sdm_loss(image, text, SAME).item() == pytest.approx(expected, rel=1e-5)


def test_asdm_weighs_a_row_by_how_far_its_best_match_is_ahead(
    features: tuple[Tensor, Tensor],
) -> None:
    image, text = (F.normalize(x, dim=-1) for x in features)
    expected, wrong = 0.0, 0
    for queries, gallery in ((text, image), (image, text)):
        for i, query in enumerate(queries):
            cosines, same = gallery @ query, LABELS[i] == LABELS
            gap = max(cosines.tolist()) - max(cosines[same].tolist())
            wrong += gap > 0
            p = (cosines / 0.02).softmax(0)
            q = same.float() / same.sum()
            divergence = sum(
                a * (math.log(a) - math.log(b + 1e-8))
                for a, b in zip(p.tolist(), q.tolist(), strict=True)
            )
            expected += (1 + 10 * gap) * divergence / len(queries)
    assert 0 < wrong < 2 * len(LABELS)
    assert asdm_loss(image, text, SAME).item() == pytest.approx(expected, rel=1e-5)


def test_tal_keeps_a_margin_to_the_soft_maximum_of_other_people(
    features: tuple[Tensor, Tensor],
) -> None:
    image, text = (F.normalize(x, dim=-1) for x in features)
    expected, met = 0.0, 0
    for queries, gallery in ((text, image), (image, text)):
        for i, query in enumerate(queries):
            cosines, same = gallery @ query, LABELS[i] == LABELS
            positive = (cosines[same] / 0.015).softmax(0) @ cosines[same]
            negative = 0.015 * (cosines[~same] / 0.015).logsumexp(0)
            cost = (0.1 - positive + negative).item()
            met += cost <= 0
            expected += max(cost, 0.0)
    assert 0 < met < 2 * len(LABELS)
    assert tal_loss(image, text, SAME).item() == pytest.approx(expected, rel=1e-5)


def test_tal_takes_the_weights_of_right_items_for_constants(
    features: tuple[Tensor, Tensor],
) -> None:
    image, text = (F.normalize(x, dim=-1).requires_grad_() for x in features)
    expected = image.new_zeros(())
    for queries, gallery in ((text, image), (image, text)):
        for i, query in enumerate(queries):
            cosines, same = gallery @ query, LABELS[i] == LABELS
            positive = (cosines[same].detach() / 0.015).softmax(0) @ cosines[same]
            negative = 0.015 * (cosines[~same] / 0.015).logsumexp(0)
            expected = expected + (0.1 - positive + negative).clamp(min=0)
    found_2 = torch.autograd.grad(tal_loss(image, text, SAME), (image, text))
    expected_2 = torch.autograd.grad(expected, (image, text))
    torch.testing.assert_close(found_2, expected_2, rtol=1e-4, atol=1e-5)


def test_a_batch_of_one_person_gives_no_loss_and_no_gradient() -> None:
    image = F.normalize(torch.randn(3, 6), dim=-1).requires_grad_()
    for loss in (tal_loss, asdm_loss):
        value = loss(image, image.detach(), torch.ones(3, 3, dtype=torch.bool))
        (gradient,) = torch.autograd.grad(value, image)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()
    assert tal_loss(image, image, torch.ones(3, 3, dtype=torch.bool)).item() == 0


@pytest.mark.parametrize(("loss", "learned"), [("sdm", 0.0), ("asdm", 1.0), ("tal", 1.0)])
def test_a_start_that_is_saturated_at_wrong_answers_is_left(loss: str, learned: float) -> None:
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
    features: tuple[Tensor, Tensor],
) -> None:
    expected = kl_both_ways(
        lambda query, gallery: gallery @ query / gallery.norm(dim=-1), *features
    )
    assert cmpm_loss(*features, SAME).item() == pytest.approx(expected, rel=1e-5)


def test_itc_has_the_own_partner_as_only_target(features: tuple[Tensor, Tensor]) -> None:
    image, text = (F.normalize(x, dim=-1) for x in features)
    expected = 0.0
    for queries, gallery in ((text, image), (image, text)):
        for i, query in enumerate(queries):
            logits = gallery @ query / 0.02
            expected += (logits.logsumexp(0) - logits[i]).item() / (2 * len(queries))
    assert itc_loss(image, text).item() == pytest.approx(expected, rel=1e-5)


def test_id_classifies_both_modalities_with_one_classifier(
    features: tuple[Tensor, Tensor],
) -> None:
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


def test_an_objective_is_the_sum_of_its_losses(features: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    parts = []
    for name in LOSSES:
        torch.manual_seed(0)
        parts.append(Objective((name,), 6, 3)(*features, LABELS).item())
    torch.manual_seed(0)
    together = Objective(LOSSES, 6, 3)(*features, LABELS).item()
    assert together == pytest.approx(sum(parts), rel=1e-6)
    assert len({round(part, 3) for part in parts}) == len(LOSSES)


def test_sdm_and_itc_do_not_see_the_length_of_features(features: tuple[Tensor, Tensor]) -> None:
    image, text = features
    objective = Objective(("sdm", "itc"), 6, 3)
    assert objective(image * 3, text, LABELS).item() == pytest.approx(
        objective(image, text, LABELS).item(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sdn", "loss 'sdn' is unknown: did you mean 'sdm'"),
        ("sdm+", "loss '' is unknown"),
        ("sdm+id+sdm", "names a loss twice"),
        ("", "loss '' is unknown"),
    ],
)
def test_a_bad_list_of_losses_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("+", r"\+")):
        loss_names(text)


def test_wrong_captions_push_their_image_away() -> None:
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


def test_a_run_has_a_temperature_of_its_own(features: tuple[Tensor, Tensor]) -> None:
    image, text = (F.normalize(x, dim=-1) for x in features)
    expected = kl_both_ways(lambda query, gallery: gallery @ query / 0.05, image, text)
    found = Objective(("sdm",), 6, 3, temperature=0.05)(*features, LABELS)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    for name in ("asdm", "itc"):
        cool, warm = (
            Objective((name,), 6, 3, temperature)(*features, LABELS).item()
            for temperature in (0.02, 0.05)
        )
        assert cool > warm  # Of random features the best match is often wrong.
    wrong = text.roll(1, dims=0)
    lead = (image * (text - wrong)).sum(dim=1)
    assert wrong_caption_loss(image, text, wrong, 0.01).item() == pytest.approx(
        F.softplus(-lead / 0.01).mean().item(), rel=1e-5
    )


def test_a_text_that_fits_others_is_right_for_them(features: tuple[Tensor, Tensor]) -> None:
    """The fit of one text to two images is what those being of its own identity would be."""
    labels = torch.arange(5)
    fits = torch.zeros(5, 5, dtype=torch.bool)
    fits[0, 2] = fits[2, 0] = True
    for name in ("sdm", "asdm", "tal"):
        objective = Objective((name,), 6, 5)
        same = objective(*features, torch.tensor([0, 1, 0, 3, 4]))
        assert objective(*features, labels, fits).item() == pytest.approx(same.item())
        assert objective(*features, labels).item() != pytest.approx(same.item())

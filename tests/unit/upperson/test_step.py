"""One step's loss and gradients against those of the whole batch, written out plainly."""

import pytest
import torch

from tests.helpers.toy_clip import normalised, toy_ids, toy_model, toy_pixels
from upperson.components import start_accelerator
from upperson.config import TrainConfig
from upperson.data.batches import Batch
from upperson.losses import Objective, wrong_caption_loss
from upperson.step import backward_through_batch, build_optimizer, schedule, set_learning_rate


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_learns_from_captions_from_wrong_ones_and_from_what_fits(accumulate):
    model, objective = toy_model(), Objective(("sdm",), 24, 4)
    image_N3HW = normalised(model, toy_pixels(4))
    ids_NL, wrong_NL = toy_ids([5, 9, 7, 9]).long(), toy_ids([9, 6, 5, 9], seed=5).long()
    labels_N = torch.arange(4)
    mentioned_NK = torch.tensor([[1, 0], [1, 1], [0, 1], [1, 1]]).bool()
    known_NK = torch.tensor([[1, 0], [1, 1], [0, 1], [1, 1]]).bool()
    fits_NN = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 1], [0, 1, 1, 1], [0, 1, 0, 1]]).bool()

    image_NE, text_NE = model(image_N3HW, ids_NL)
    expected = objective(image_NE, text_NE, labels_N, fits_NN)
    expected = expected + wrong_caption_loss(image_NE, text_NE, model.text(wrong_NL))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(expected, list(trained.values()))

    batch = Batch(image_N3HW, ids_NL, labels_N, wrong_NL, mentioned_NK, known_NK)
    accelerator = start_accelerator("fp32", "cpu")
    loss = backward_through_batch(accelerator, model, objective, batch, [4], accumulate)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert not loss.requires_grad
    for (name, parameter), gradient in zip(trained.items(), gradients, strict=True):
        assert parameter.grad is not None, name
        largest = float(gradient.abs().max())
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4 * largest + 1e-7)


def test_prefixes_have_a_rate_of_their_own_and_biases_no_decay():
    config = TrainConfig(
        root="", lr=1.0, prefix_lr=3.0, weight_decay=0.5, epochs=6, warmup_epochs=2
    )
    names = {
        "a.weight": (0.5, 1),
        "a.bias": (0, 1),
        "b.prefix.x": (0.5, 3),
        "b.prefix.bias": (0, 3),
    }
    parameters = {name: torch.nn.Parameter(torch.zeros(1)) for name in names}
    frozen = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    optimizer = build_optimizer([*parameters.items(), ("c.weight", frozen)], config)
    assert set_learning_rate(optimizer, 1, config) == pytest.approx(0.55)
    found = {
        id(parameter): (group["weight_decay"], group["lr"] / 0.55)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert len(found) == len(names)
    for name, expected in names.items():
        assert found[id(parameters[name])] == pytest.approx(expected), name


def test_the_rate_rises_to_its_peak_and_falls_to_nothing():
    config = TrainConfig(root="", epochs=6, warmup_epochs=2)
    rates = [schedule(epoch, config) for epoch in range(7)]
    assert rates == pytest.approx([0.1, 0.55, 1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0])

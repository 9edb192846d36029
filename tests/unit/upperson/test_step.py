"""One step's loss and gradients against those of the whole batch, written out plainly."""

import pytest
import torch

from tests.helpers.toy_clip import normalised, toy_ids, toy_model, toy_pixels
from upperson.components import start_accelerator
from upperson.data.batches import Batch
from upperson.losses import Objective, wrong_caption_loss
from upperson.step import backward_through_batch


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

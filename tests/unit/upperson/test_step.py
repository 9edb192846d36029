"""One step: its loss and gradients against the whole batch's, and what it keeps for them."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests.helpers.toy_clip import normalised, toy_ids, toy_model, toy_pixels
from upperson.components import start_accelerator
from upperson.data.batches import Batch
from upperson.losses import Objective, wrong_caption_loss
from upperson.model.parts import UPPersonConfig
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


def saved(model, forward):
    """Return one tensor of every storage that a forward pass keeps, parameters left out."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    frozen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return [tensor for place, tensor in kept.items() if place not in frozen]


def size_bytes(tensors):
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_a_block_keeps_seven_narrow_tensors_and_one_wide():
    batch, length, width, prefix_length = 8, 40, 64, 3
    model = toy_model()
    x_NLD = torch.randn(batch, length, width, requires_grad=True)
    kept = [t for t in saved(model, lambda: model.image.blocks[0](x_NLD)) if t.ndim >= 2]
    wide = [t for t in kept if t.shape[-1] == 4 * width]
    assert [t.numel() for t in wide] == [batch * length * 4 * width]
    # x before attention and before the MLP, its input, q, k, v, and what attention returns.
    narrow = size_bytes([t for t in kept if t.numel() >= batch * length * width]) - size_bytes(wide)
    assert narrow == 4 * batch * width * (7 * length + 2 * prefix_length)


def test_the_last_block_computes_the_pooled_token_alone():
    model = toy_model()
    image, ids = normalised(model, toy_pixels(2)), toy_ids([5, 9]).long()
    shapes = []
    for tower in (model.image, model.text):
        tower.blocks[-1].ln_2.register_forward_hook(lambda _, __, out: shapes.append(out.shape))
    model(image, ids)
    assert [tuple(shape) for shape in shapes] == [(2, 64), (2, 48)]


def test_checkpointing_has_the_same_gradients_and_keeps_less(monkeypatch):
    config = UPPersonConfig(prefix_length=3, lora_rank=4, adapter_reduction=4, prefix_blocks="1")
    image, ids = normalised(toy_model(), toy_pixels(3)), toy_ids([4, 9, 20]).long()
    gradients, sizes = [], []
    for checkpointed in (False, True):
        model = toy_model(config)
        model.checkpoint_activations = checkpointed
        torch.stack(model(image, ids)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        sizes.append(size_bytes(saved(model, lambda model=model: model(image, ids))))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert sizes[1] < 0.5 * sizes[0]
    monkeypatch.setattr("upperson.model.encoder.checkpoint", None)
    with torch.no_grad():  # It is for training only.
        model.encode_text(ids)

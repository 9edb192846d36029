"""What a training step keeps for its backward pass, counted, and activation checkpointing."""

import pytest
import torch
from open_clip.model import CLIP
from torch.autograd.graph import saved_tensors_hooks

from tests.helpers.toy_clip import TOY, normalised, toy_ids, toy_model, toy_pixels
from upperson.model.parts import UPPersonConfig, frozen_mlp


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


@pytest.mark.parametrize("prefix_blocks", ["all", "1"])
def test_checkpointing_has_the_same_gradients_and_keeps_less(prefix_blocks):
    config = UPPersonConfig(
        prefix_length=3, lora_rank=4, adapter_reduction=4, prefix_blocks=prefix_blocks
    )
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


def test_checkpointing_is_for_training_only(monkeypatch):
    model = toy_model()
    model.checkpoint_activations = True
    monkeypatch.setattr("upperson.model.encoder.checkpoint", None)
    with torch.no_grad():
        model.encode_text(toy_ids([4]).long())


@pytest.mark.parametrize("quick", [True, False], ids=["QuickGELU", "GELU"])
def test_the_mlp_equals_the_bases(quick):
    torch.manual_seed(0)
    mlp = CLIP(**(TOY | {"quick_gelu": quick})).visual.transformer.resblocks[0].mlp.double()
    mlp.requires_grad_(False)
    for layer in (mlp.c_fc, mlp.c_proj):
        torch.nn.init.normal_(layer.bias)
        torch.nn.init.normal_(layer.weight, std=0.2)
    u = torch.randn(2, 3, 64, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(frozen_mlp(mlp, u), mlp(u), atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda x: frozen_mlp(mlp, x), u)

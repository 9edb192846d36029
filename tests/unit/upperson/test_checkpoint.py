"""The hash of a checkpoint covers its state, not only its tensors."""

import torch

from tests.helpers.refused import refused
from upperson.checkpoint import Checkpointer, RunState
from upperson_rt.errors import IntegrityError


def test_a_changed_number_of_the_state_is_damage(tmp_path):
    layer = torch.nn.Linear(2, 2)
    checkpointer = Checkpointer(tmp_path, layer, torch.optim.Adam(layer.parameters()), None, {})
    checkpointer.save(RunState(epoch=7), 1)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    before, after = (rf"\"epoch\": {epoch}".encode() for epoch in (7, 8))
    assert content.count(before) == 1
    file.write_bytes(content.replace(before, after))
    with refused("checkpoints_damaged", IntegrityError, path=tmp_path) as found:
        checkpointer.load()
    assert "hash" in found.value.fields["problems"][0]

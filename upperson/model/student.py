"""A smaller image tower in the space of a larger one: fewer blocks, narrower, nothing but CLIP.

It has the patches, head size and activation of its teacher's base and none of UP-Person's parts:
all of it is trained. It starts as a piece of its teacher: evenly spaced blocks, with the LoRA in
their keys and values, and of the residual stream, heads and hidden units those with the largest
weights.

Shapes: D width of the teacher, d of the student, H heads of the teacher, C channels of a head.
"""

import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from upperson.model.architecture import image_architecture
from upperson.model.encoder import ImageEncoder
from upperson.model.parts import PLAIN_CLIP
from upperson_rt.errors import UsageError
from upperson_rt.printable import shown


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig:
    """What a distilled run adds to the settings of a run; ``upperson distill`` writes it."""

    size: str
    """Its image tower, ``BLOCKSxWIDTH``."""

    teacher: str
    """Run folder that it learns from."""

    space: str
    """Fingerprint of the teacher's bundles."""

    pictures: tuple[str, ...] = ()
    """Files and folders of pictures beside the training split's; they need no captions."""

    def __post_init__(self) -> None:
        read_size(self.size)


def read_size(text: str) -> tuple[int, int]:
    """Read ``BLOCKSxWIDTH`` such as 6x384; UsageError if it is none."""
    found = re.fullmatch(r"([1-9]\d{0,2})x([1-9]\d{0,4})", text)
    if found is None:
        raise UsageError(
            "a student is BLOCKSxWIDTH, such as 6x384 for six blocks of width 384; found "
            f"{shown(text)}"
        )
    return int(found[1]), int(found[2])


def require_smaller(student: tuple[int, int], teacher: tuple[int, int]) -> None:
    """Raise UsageError unless a student has less blocks or width, and more of neither."""
    if student == teacher or student[0] > teacher[0] or student[1] > teacher[1]:
        raise UsageError(
            f"a student must be smaller than its teacher, of {teacher[0]} blocks of width "
            f"{teacher[1]}; found {student[0]}x{student[1]}"
        )


def build_student(
    tower: ImageEncoder, size: tuple[int, int], image_size: tuple[int, int]
) -> ImageEncoder:
    """Build a student with random weights.

    Args:
        tower: Of the base or of a teacher, which the student is a smaller form of.
        size: Blocks and width d.
        image_size: (height_px, width_px).

    Raises:
        UsageError: It is not smaller than the tower, d is no multiple of the heads' size, or the
            tower is no plain ViT.
    """
    blocks, width = size
    first: Any = tower.blocks[0]
    teacher_width = first.attn.embed_dim
    require_smaller(size, (len(tower.blocks), teacher_width))
    head = teacher_width // first.heads
    if width % head:
        raise UsageError(
            f"a student's width must be a multiple of {head}, the size of its teacher's heads; "
            f"found {width}"
        )
    stem: Any = tower.stem
    plain = (
        isinstance(stem, nn.Conv2d)
        and stem.bias is None
        and tower.class_embedding is not None
        and isinstance(tower.ln_pre, nn.LayerNorm)
        and tower.pool is None
        and tower.proj_bias is None
    )
    if not plain or tower.proj is None:
        raise UsageError(
            "a student needs a teacher with CLIP's own image tower, such as that of ViT-B-16; this "
            "base makes patches or pools in another way"
        )
    visual = VisionTransformer(
        image_size=image_size,
        patch_size=stem.kernel_size[0],
        width=width,
        layers=blocks,
        heads=width // head,
        mlp_ratio=first.mlp.c_fc.out_features / teacher_width,
        act_layer=type(first.mlp.gelu),
        output_dim=tower.proj.shape[1],
    )
    base = image_architecture(SimpleNamespace(visual=visual))
    return ImageEncoder(base, PLAIN_CLIP, *image_size)


@torch.no_grad()
def start_from_teacher(student: Any, teacher: Any) -> None:
    """Copy pieces of the weights of a teacher's tower into a student that was built for it."""
    width = len(student.class_embedding)
    places = torch.linspace(0, len(teacher.blocks) - 1, len(student.blocks)).round().int()
    chosen: list[Any] = [teacher.blocks[index] for index in places]
    written_D = teacher.stem.weight.flatten(1).square().sum(1)
    for block in chosen:
        written_D = written_D + block.attn.out_proj.weight.square().sum(1)
        written_D = written_D + block.mlp.c_proj.weight.square().sum(1)
    kept_d = _largest(written_D, width)
    student.stem.weight.copy_(teacher.stem.weight[kept_d])
    student.class_embedding.copy_(teacher.class_embedding[kept_d])
    student.positional_embedding.copy_(teacher.positional_embedding[:, kept_d])
    student.proj.copy_(teacher.proj[kept_d])
    for name in ("ln_pre", "ln_post"):
        _copy_norm(getattr(student, name), getattr(teacher, name), kept_d)
    for mine, theirs in zip(student.blocks, chosen, strict=True):
        _copy_block(mine, theirs, kept_d)


def _copy_block(mine: Any, theirs: Any, kept_d: Tensor) -> None:
    out_DD = theirs.attn.out_proj.weight
    strength_H = out_DD.square().sum(0).view(theirs.heads, -1).sum(1)
    channels_HC = torch.arange(out_DD.shape[1]).view(theirs.heads, -1)
    inner_d = channels_HC[_largest(strength_H, mine.heads)].flatten()
    query_DD, key_DD, value_DD = theirs.attn.in_proj_weight.chunk(3)
    if theirs.lora is not None:
        key_DD = key_DD + _delta(theirs.lora.key)
        value_DD = value_DD + _delta(theirs.lora.value)
    rows = [weight_DD[inner_d][:, kept_d] for weight_DD in (query_DD, key_DD, value_DD)]
    mine.attn.in_proj_weight.copy_(torch.cat(rows))
    biases = [bias_D[inner_d] for bias_D in theirs.attn.in_proj_bias.chunk(3)]
    mine.attn.in_proj_bias.copy_(torch.cat(biases))
    mine.attn.out_proj.weight.copy_(out_DD[kept_d][:, inner_d])
    mine.attn.out_proj.bias.copy_(theirs.attn.out_proj.bias[kept_d])
    first, second = theirs.mlp.c_fc, theirs.mlp.c_proj
    strength = first.weight.square().sum(1) * second.weight.square().sum(0)
    hidden = _largest(strength, mine.mlp.c_fc.out_features)
    mine.mlp.c_fc.weight.copy_(first.weight[hidden][:, kept_d])
    mine.mlp.c_fc.bias.copy_(first.bias[hidden])
    mine.mlp.c_proj.weight.copy_(second.weight[kept_d][:, hidden])
    mine.mlp.c_proj.bias.copy_(second.bias[kept_d])
    for name in ("ln_1", "ln_2"):
        _copy_norm(getattr(mine, name), getattr(theirs, name), kept_d)


def _copy_norm(mine: Any, theirs: Any, kept_d: Tensor) -> None:
    mine.weight.copy_(theirs.weight[kept_d])
    mine.bias.copy_(theirs.bias[kept_d])


def _delta(lora: Any) -> Tensor:
    delta: Tensor = lora.scale * lora.up @ lora.down
    return delta


def _largest(strength: Tensor, count: int) -> Tensor:
    """Return the indices of the largest, in their own order."""
    return strength.topk(count).indices.sort().values

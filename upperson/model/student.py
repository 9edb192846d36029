"""A smaller image tower in the space of a larger one: fewer blocks, narrower, larger patches.

It has the head size and activation of its teacher's base and none of UP-Person's parts: all of it
is trained. It starts as a piece of its teacher: evenly spaced blocks, with the LoRA in their keys
and values, and of the residual stream, heads and hidden units those with the largest weights. A
larger patch starts as the mean of the teacher's patches within it.

Shapes: D width of the teacher, d of the student, H heads of the teacher, C channels of a head,
r rows and c columns of pixels in a patch.
"""

import math
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from upperson.model.architecture import image_architecture
from upperson.model.encoder import ImageEncoder, patch_grid
from upperson.model.parts import PLAIN_CLIP
from upperson_rt.errors import UsageError
from upperson_rt.printable import safe_repr


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig:
    """What a distilled run adds to the settings of a run; ``upperson distill`` writes it."""

    size: str
    """Its image tower, ``BLOCKSxWIDTH`` or ``BLOCKSxWIDTH@HEIGHTxWIDTH``, see `read_size`."""

    teacher: str
    """Run folder that it learns from."""

    space: str
    """Fingerprint of the teacher's bundles."""

    pictures: tuple[str, ...] = ()
    """Files and folders of pictures beside the training split's; they need no captions."""

    def __post_init__(self) -> None:
        read_size(self.size)


class StudentSize(NamedTuple):
    """How large a student is."""

    blocks: int
    width: int

    patch_px: tuple[int, int] | None = None
    """Height and width of a patch; None: the teacher's."""

    def __str__(self) -> str:
        """Return the text that `read_size` reads."""
        patch = "" if self.patch_px is None else "@{}x{}".format(*self.patch_px)
        return f"{self.blocks}x{self.width}{patch}"


def read_size(text: str) -> StudentSize:
    """Read ``BLOCKSxWIDTH``, such as 6x384, or with patches of so many pixels, 6x384@32x16."""
    found = re.fullmatch(r"([1-9]\d{0,2})x([1-9]\d{0,4})(?:@([1-9]\d{0,3})x([1-9]\d{0,3}))?", text)
    if found is None:
        raise UsageError(
            "a student is BLOCKSxWIDTH, such as 6x384 for six blocks of width 384, or with patches "
            f"of 32 rows and 16 columns of pixels 6x384@32x16; found {safe_repr(text)}",
            code="student_malformed",
            found=text,
        )
    blocks, width, *patch = (int(number) if number else 0 for number in found.groups())
    return StudentSize(blocks, width, (patch[0], patch[1]) if all(patch) else None)


def require_smaller(student: StudentSize, teacher: StudentSize) -> None:
    """Raise UsageError unless a student has less work to do, and more of nothing."""
    assert student.patch_px is not None
    assert teacher.patch_px is not None
    more = student.blocks > teacher.blocks or student.width > teacher.width
    finer = any(own < other for own, other in zip(student.patch_px, teacher.patch_px, strict=True))
    if student == teacher or more or finer:
        raise UsageError(
            f"a student must be smaller than its teacher, {teacher}: no more blocks, no "
            f"wider, no smaller patches, and one of them less; found {student}",
            code="student_not_smaller",
            teacher=str(teacher),
            student=str(student),
        )


class Patches(nn.Conv2d):
    """Patches that do not overlap, as one matrix product.

    Gradients of such a convolution take a CPU several times as long.
    """

    def forward(self, image_N3HW: Tensor) -> Tensor:
        """Return [N, d, rows, columns]."""
        rows_px, columns_px = self.kernel_size
        in_columns = torch.unflatten(image_N3HW, 3, (-1, columns_px))
        pixels = torch.unflatten(in_columns, 2, (-1, rows_px)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(pixels, self.weight.flatten(1)).permute(0, 3, 1, 2)


def build_student(
    tower: ImageEncoder, size: StudentSize, image_size: tuple[int, int]
) -> ImageEncoder:
    """Build a student of a base's or a teacher's tower, with random weights.

    UsageError if it is not smaller than the tower, if its width, its patches or the size of the
    pictures do not fit, or if the tower is no plain ViT.
    """
    first: Any = tower.blocks[0]
    teacher_width = first.attn.embed_dim
    head = teacher_width // first.heads
    blocks, width, patch_px = size
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
            "base makes patches or pools in another way",
            code="teacher_unsupported",
        )
    patch_px = patch_px or stem.kernel_size
    require_smaller(
        StudentSize(blocks, width, patch_px),
        StudentSize(len(tower.blocks), teacher_width, stem.kernel_size),
    )
    if width % head:
        raise UsageError(
            f"a student's width must be a multiple of {head}, the size of its teacher's heads; "
            f"found {width}",
            code="student_width",
            multiple_of=head,
            found=width,
        )
    patch_grid(patch_px, *image_size)  # Refuses what does not divide.
    visual = VisionTransformer(
        image_size=image_size,
        patch_size=patch_px,
        width=width,
        layers=blocks,
        heads=width // head,
        mlp_ratio=first.mlp.c_fc.out_features / teacher_width,
        act_layer=type(first.mlp.gelu),
        output_dim=tower.proj.shape[1],
    )
    visual.conv1 = Patches(3, width, patch_px, patch_px, bias=False)
    base = image_architecture(SimpleNamespace(visual=visual))
    return ImageEncoder(base, PLAIN_CLIP, *image_size)


@torch.no_grad()
def start_from_teacher(student: Any, teacher: Any, image_size: tuple[int, int]) -> None:
    """Copy pieces of the weights of a teacher's tower into a student that was built for it."""
    width = len(student.class_embedding)
    places = torch.linspace(0, len(teacher.blocks) - 1, len(student.blocks)).round().int()
    chosen: list[Any] = [teacher.blocks[index] for index in places]
    written_D = teacher.stem.weight.flatten(1).square().sum(1)
    for block in chosen:
        written_D = written_D + block.attn.out_proj.weight.square().sum(1)
        written_D = written_D + block.mlp.c_proj.weight.square().sum(1)
    kept_d = _largest(written_D, width)
    before, after = (patch_grid(each.stem.kernel_size, *image_size) for each in (teacher, student))
    kernel_d3rc = teacher.stem.weight[kept_d]
    student.stem.weight.copy_(_mean_within(kernel_d3rc, student.stem.kernel_size))
    student.class_embedding.copy_(teacher.class_embedding[kept_d])
    positions_Ld = teacher.positional_embedding[:, kept_d]
    student.positional_embedding.copy_(_coarser(positions_Ld, before, after))
    student.proj.copy_(teacher.proj[kept_d])
    for name in ("ln_pre", "ln_post"):
        _copy_norm(getattr(student, name), getattr(teacher, name), kept_d)
    for block, source in zip(student.blocks, chosen, strict=True):
        _copy_block(block, source, kept_d)


def _mean_within(kernel_d3rc: Tensor, patch_px: tuple[int, int]) -> Tensor:
    """Return the kernel of the mean of what one gives, spread evenly over a larger patch."""
    larger_d3rc = kernel_d3rc.new_zeros(*kernel_d3rc.shape[:2], *patch_px)
    rows, columns = kernel_d3rc.shape[2:]
    tops, lefts = (
        torch.linspace(0, whole - part, math.ceil(whole / part)).round().int().tolist()
        for whole, part in zip(patch_px, (rows, columns), strict=True)
    )
    for top in tops:
        for left in lefts:
            larger_d3rc[:, :, top : top + rows, left : left + columns] += kernel_d3rc
    return larger_d3rc / (len(tops) * len(lefts))


def _coarser(positions_Ld: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """Return the positions of a coarser grid, as means; the class row stays."""
    grid_1dRC = positions_Ld[1:].T.reshape(1, -1, *before)
    rows_Ld = F.adaptive_avg_pool2d(grid_1dRC, after).flatten(2)[0].T
    return torch.cat([positions_Ld[:1], rows_Ld])


def _copy_block(student: Any, teacher: Any, kept_d: Tensor) -> None:
    out_DD = teacher.attn.out_proj.weight
    strength_H = out_DD.square().sum(0).view(teacher.heads, -1).sum(1)
    channels_HC = torch.arange(out_DD.shape[1]).view(teacher.heads, -1)
    inner_d = channels_HC[_largest(strength_H, student.heads)].flatten()
    query_DD, key_DD, value_DD = teacher.attn.in_proj_weight.chunk(3)
    if teacher.lora is not None:
        key_DD = key_DD + _delta(teacher.lora.key)
        value_DD = value_DD + _delta(teacher.lora.value)
    rows = [weight_DD[inner_d][:, kept_d] for weight_DD in (query_DD, key_DD, value_DD)]
    student.attn.in_proj_weight.copy_(torch.cat(rows))
    biases = [bias_D[inner_d] for bias_D in teacher.attn.in_proj_bias.chunk(3)]
    student.attn.in_proj_bias.copy_(torch.cat(biases))
    student.attn.out_proj.weight.copy_(out_DD[kept_d][:, inner_d])
    student.attn.out_proj.bias.copy_(teacher.attn.out_proj.bias[kept_d])
    first, second = teacher.mlp.c_fc, teacher.mlp.c_proj
    strength = first.weight.square().sum(1) * second.weight.square().sum(0)
    hidden = _largest(strength, student.mlp.c_fc.out_features)
    student.mlp.c_fc.weight.copy_(first.weight[hidden][:, kept_d])
    student.mlp.c_fc.bias.copy_(first.bias[hidden])
    student.mlp.c_proj.weight.copy_(second.weight[kept_d][:, hidden])
    student.mlp.c_proj.bias.copy_(second.bias[kept_d])
    for name in ("ln_1", "ln_2"):
        _copy_norm(getattr(student, name), getattr(teacher, name), kept_d)


def _copy_norm(student: Any, teacher: Any, kept_d: Tensor) -> None:
    student.weight.copy_(teacher.weight[kept_d])
    student.bias.copy_(teacher.bias[kept_d])


def _delta(lora: Any) -> Tensor:
    delta: Tensor = lora.scale * lora.up @ lora.down
    return delta


def _largest(strength: Tensor, count: int) -> Tensor:
    """Return the indices of the largest, in their own order."""
    return strength.topk(count).indices.sort().values

"""What a run needs before its first step: accelerator, data, base, model and loss.

One process trains on what is there; several are started by ``torchrun`` or ``accelerate launch``
and find each other through the environment those set.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from upperson.config import MixedPrecision, TrainConfig
from upperson.data.annotations import annotations_file
from upperson.data.batches import identity_labels, tokenize
from upperson.data.check import require_published_counts
from upperson.data.images import require_images
from upperson.data.records import Record, Split, read_dataset
from upperson.data.rewording import Rewording, require_phrases
from upperson.losses import Objective, loss_names
from upperson.model.base import Base, load_base
from upperson.model.encoder import UPPerson
from upperson.model.parts import QUICK_GELU_SLOPE
from upperson_rt.errors import BackendError, InputError, UsageError
from upperson_rt.machine import processor
from upperson_rt.tokenizer import Tokenizer

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What the towers are autocast to; fp32 is not."""

NO_BF16 = (
    "this processor has no instructions for bf16, which would take minutes a step: training in fp32"
)

_PATIENCE = timedelta(hours=2)
"""How long a process waits for the others: one of them builds the cache or writes results. NCCL's
own limit, ten minutes, would end the run; a process that has died ends it at once anyway."""

Splits = dict[Split, list[Record]]


@dataclass(frozen=True, slots=True)
class Components:
    """What a run is made of, on the CPU, with fresh trained tensors drawn from its seed."""

    splits: Splits
    base: Base
    model: UPPerson
    objective: Objective
    tokenizer: Tokenizer

    notes: tuple[str, ...] = ()
    """Notices about the data, a line each."""


def build_components(config: TrainConfig) -> Components:
    """Read the data and build the model; UsageError or InputError if one cannot be used."""
    if config.student is not None:
        raise UsageError(
            "a student is not trained with captions but distilled: go on with  upperson distill "
            "--resume RUN, or leave 'student' out of the recipe",
            code="student_in_training",
        )
    if config.model.is_plain:
        raise UsageError(
            "no part is trained: set prefix_length, lora_rank or adapter_reduction",
            code="no_trained_part",
        )
    if config.leave_out_noisy and config.warmup_epochs >= config.epochs:
        raise UsageError(
            f"leave_out_noisy begins after the warm-up, and warmup_epochs ({config.warmup_epochs}) "
            f"leaves none of the epochs ({config.epochs}): train longer, pass  --set warmup_epochs="
            f"{config.epochs - 1},  or switch leave_out_noisy off",
            code="noisy_in_warmup",
            epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,
        )
    splits = read_dataset(config.dataset, Path(config.root))
    if not splits["train"]:
        raise InputError(
            f"{config.root} has no image in split 'train': check 'split' in its lines",
            code="split_empty",
            split="train",
        )
    rehearsed = _rehearsed(config, splits["train"])
    require_images(record.image for records in (*splits.values(), rehearsed) for record in records)
    if not config.allow_partial:
        require_published_counts(config.dataset, Path(config.root), splits)
    splits["train"] += rehearsed
    if config.select_on == "test" and not splits["test"]:
        raise InputError(
            f"{config.root} has no image in split 'test' to select on",
            code="split_empty",
            split="test",
        )
    captions = [caption for record in splits["train"] for caption in record.captions]
    rewordings: tuple[Rewording, ...] = ("shorten_captions", "wrong_captions")
    notes = [require_phrases(captions, option) for option in rewordings if getattr(config, option)]
    image_size = (config.height_px, config.width_px)
    torch.manual_seed(config.seed)
    base = load_base(config.base, config.pretrained, image_size, draw=True)
    if config.mask_captions and not base.has_clips_vocabulary:
        raise UsageError(
            f"mask_captions needs CLIP's vocabulary, which {base.name} does not have: pass  "
            "--set mask_captions=false",
            code="vocabulary_without_mask",
            base=base.name,
        )
    model = UPPerson(base.clip, config.model, image_size, base.statistics)
    model.checkpoint_activations = config.checkpoint_activations
    tokenizer = base.tokenizer()
    if config.learn_words:
        new_T = unseen_tokens(model, tokenizer, captions)
        notes.append(_note_words(len(new_T)))
        if len(new_T):
            model.text.learn_tokens(new_T)
    fold_quick_gelu(model)  # From here on the base is no longer what it was loaded as.
    keep_frozen_matrices_in(model, config.precision)
    identities = len(identity_labels(splits["train"]))
    objective = Objective(loss_names(config.loss), model.embed_dim, identities, config.temperature)
    return Components(splits, base, model, objective, tokenizer, tuple(filter(None, notes)))


def _rehearsed(config: TrainConfig, own: Sequence[Record]) -> list[Record]:
    """Read what is to be rehearsed; its people are numbered after our own."""
    if config.rehearse is None:
        return []
    root = Path(config.rehearse)
    file = root / annotations_file("jsonl")
    if not file.is_file():
        raise InputError(
            f"expected people to rehearse in {file}, found no such file: pass --rehearse with the "
            "folder of a data set that has one",
            code="rehearsal_missing",
            path=file,
        )
    records = read_dataset("jsonl", root)["train"]
    if not records:
        raise InputError(
            f"{root} has no image in split 'train' to rehearse: check 'split' in its lines",
            code="split_empty",
            split="train",
        )
    images = {record.image.resolve() for record in own}
    shared = next((record.image for record in records if record.image.resolve() in images), None)
    if shared is not None:
        # Under two numbers, a person would be taken for two.
        raise InputError(
            f"{shared} is in the data set and among the people to rehearse: pass --rehearse with "
            "other people",
            code="rehearsal_shared",
            image=shared,
        )
    first = 1 + max(record.pid for record in own)
    numbers = identity_labels(records)
    return [replace(record, pid=first + numbers[record.pid]) for record in records]


def unseen_tokens(model: UPPerson, tokenizer: Tokenizer, captions: Sequence[str]) -> Tensor:
    """Return the tokens of captions whose embedding is zero, int64, in order."""
    found = np.unique(np.concatenate([row.ravel() for row in tokenize(tokenizer, captions)]))
    ids_T = torch.from_numpy(found.astype(np.int64))
    return ids_T[~model.text.token_embedding.weight[ids_T].any(dim=1)]


def _note_words(count: int) -> str:
    if not count:
        return "learn_words changes nothing: the base has seen every token of the captions"
    return f"learning {count} tokens that the base has not seen"


def choose_device(device: str) -> torch.device:
    """Return the device for ``cpu``, ``cuda``, or ``auto``: CUDA if there is one."""
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"--device must be auto, cpu or cuda, found '{device}'",
            code="device_unknown",
            device=device,
        )
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise BackendError(
            "no CUDA device is available to torch: pass --device cpu, or install a CUDA build of "
            "torch and its driver",
            code="cuda_unavailable",
        )
    return torch.device("cuda" if has_cuda and device != "cpu" else "cpu")


def check_precision(precision: MixedPrecision, device: torch.device) -> None:
    """Raise BackendError where a device cannot train in a precision."""
    if precision == "fp16" and device.type == "cpu":
        raise BackendError(
            "precision fp16 needs a CUDA device: use bf16 or fp32 on a CPU",
            code="precision_unavailable",
            precision=precision,
        )


def usable_precision(precision: MixedPrecision, device: torch.device) -> MixedPrecision:
    """Return fp32 for bf16 on a CPU without instructions for it: a step takes minutes there."""
    check_precision(precision, device)
    on_cpu = device.type == "cpu"
    return "fp32" if precision == "bf16" and on_cpu and not processor().has_bf16 else precision


def start_accelerator(precision: MixedPrecision, device: str) -> Accelerator:
    """Choose the device and join the other processes, if a launcher started some."""
    chosen = choose_device(device)
    check_precision(precision, chosen)
    # accelerate keeps one state a process; a second run in it may have another precision.
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        cpu=chosen.type == "cpu",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
    )


def fold_quick_gelu(model: UPPerson) -> None:
    """Let the frozen matrices of a model that is trained carry QuickGELU's slope.

    h * sigmoid(1.702 h) = silu(1.702 h) / 1.702: the first matrix is scaled by it and the second by
    its inverse, in place, the base's too, and what is left between them is silu. A product that
    scales its bias, as `frozen_mlp` has it otherwise, is no fused kernel on GPUs.
    """
    for block in (*model.image.blocks, *model.text.blocks):
        if isinstance(block.mlp.gelu, QuickGELU):
            for tensor in (block.mlp.c_fc.weight, block.mlp.c_fc.bias):
                tensor.data.mul_(QUICK_GELU_SLOPE)
            block.mlp.c_proj.weight.data.div_(QUICK_GELU_SLOPE)
            block.mlp.gelu = nn.SiLU()


def keep_frozen_matrices_in(model: UPPerson, precision: MixedPrecision) -> None:
    """Store what autocast would convert at every step, the frozen matrices, in its type.

    Halves the base in memory and changes no result: norms, embeddings and positions, which
    autocast reads in float32, stay so, and trained tensors are float32 master weights.
    """
    if precision == "fp32":
        return
    matrices = [model.text.text_projection]
    if model.image.proj is not None:
        matrices.append(model.image.proj)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)):
            matrices += module.parameters(recurse=False)
    for parameter in matrices:
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(AUTOCAST_DTYPES[precision])

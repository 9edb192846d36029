"""What a training run would do and need, before it does it.

The memory of activations is measured, not derived from a formula: two small forward passes show
what autograd keeps for the backward pass, and the difference is what one more pair costs.

Shapes: N batch, H image height, W image width, L tokens.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upperson.components import AUTOCAST_DTYPES, Components
from upperson.config import MixedPrecision, TrainConfig
from upperson.data.batches import BatchSampler
from upperson.data.records import Record
from upperson.model.encoder import UPPerson
from upperson.model.parts import TRAINED_PARTS, GrownEmbedding
from upperson_rt.tokenizer import Tokenizer, token_lengths

LEFT_OUT = (
    "what one layer needs for a moment while it runs (workspace, gradients of activations), the "
    "loss over the batch, the device context, and evaluation"
)
"""What the memory estimate does not contain."""

_ADAM_MOMENTS = 2
_WORTH_MENTIONING_S = 0.2
_Forward = Callable[[int], Sequence[Tensor]]
"""Runs a number of pairs and returns the outputs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitCounts:
    """How large a split is."""

    images: int
    captions: int
    people: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PartCount:
    """Trained parameters of one part."""

    part: str
    image: int
    """In the image tower."""

    text: int
    """In the text tower."""

    total: int
    """Both towers, or those of a part outside of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLengths:
    """Tokens of the training captions, SOT and EOT included."""

    mean: float
    longest: int
    """After cutting."""

    limit: int
    """Context length of the text tower."""

    cut: int
    """Captions that are longer than the limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Bytes on one device, at the peak of a step; `LEFT_OUT` says what is not in it."""

    frozen_bytes: int
    """Frozen weights and buffers in the types they are kept in."""

    trained_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    """Two moments of Adam."""

    copies_bytes: int
    """What a step keeps whatever its batch is, such as weights that autocast converts."""

    activation_bytes_per_pair: int
    """Kept for the backward pass by one image and one caption of the longest length."""

    pairs: int
    """Pairs whose activations are kept at a time."""

    @property
    def activation_bytes(self) -> int:
        """Activations of all pairs kept at a time."""
        return self.activation_bytes_per_pair * self.pairs

    @property
    def total_bytes(self) -> int:
        """Sum of all of it."""
        weights = self.frozen_bytes + self.trained_bytes + self.copies_bytes
        return weights + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What ``upperson train --dry-run`` shows."""

    splits: dict[str, SplitCounts]
    parts: tuple[PartCount, ...]
    trained: int
    """Trained parameters."""

    total: int
    """All parameters, frozen ones included."""

    batch_size: int
    epochs: int
    steps_per_epoch: int
    tokens: TokenLengths
    memory: MemoryEstimate
    step_s: float
    """Seconds a step should take; see `expected_step_s`."""

    @property
    def percent(self) -> float:
        """Trained share of all parameters, in percent."""
        return 100 * self.trained / self.total

    @property
    def steps(self) -> int:
        """Optimisation steps of the run."""
        return self.epochs * self.steps_per_epoch

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain values for JSON, with the derived ones."""
        memory = asdict(self.memory) | {
            "activation_bytes": self.memory.activation_bytes,
            "total_bytes": self.memory.total_bytes,
            "left_out": LEFT_OUT,
        }
        derived = {"percent": self.percent, "steps": self.steps, "memory": memory}
        return asdict(self) | derived


def plan(config: TrainConfig, components: Components, *, processes: int = 1) -> Plan:
    """Work out what a run does; nothing is written, no image is opened.

    The components are as they would be trained: the model on its device, frozen weights in the
    type they are kept in. Processes share a batch.
    """
    model, train = components.model, components.splits["train"]
    parts = count_parts(model)
    if isinstance(model.text.token_embedding, GrownEmbedding):
        words = model.text.token_embedding.rows.numel()
        parts += (PartCount(part="learned words", image=0, text=words, total=words),)
    if classifier := sum(p.numel() for p in components.objective.parameters()):
        parts += (PartCount(part="classifier", image=0, text=0, total=classifier),)
    captions = [text for record in train for text in record.captions]
    tokens = count_tokens(components.tokenizer, captions)
    sampler = BatchSampler(len(captions), config.batch_size, config.seed, processes=processes)
    share = -(-min(config.batch_size, len(captions)) // processes)
    return Plan(
        splits={name: count_split(records) for name, records in components.splits.items()},
        parts=parts,
        trained=sum(part.total for part in parts),
        total=sum(p.numel() for p in model.parameters()) + classifier,
        batch_size=config.batch_size,
        epochs=config.epochs,
        steps_per_epoch=len(sampler),
        tokens=tokens,
        memory=_estimate_memory(components, config, tokens.longest, -(-share // config.accumulate)),
        step_s=expected_step_s(model, config, length=tokens.longest, pairs=share),
    )


def expected_step_s(model: UPPerson, config: TrainConfig, *, length: int, pairs: int) -> float:
    """Return the seconds that the towers should need for the forward and backward pass of a step.

    A few pairs of captions of ``length`` tokens pass them, and more as long as that takes no time
    worth mentioning. Loading, the loss and the exchange with other processes are not in it. The
    model's gradients are left alone; ``pairs`` are those of one process.
    """
    piece = -(-pairs // config.accumulate)
    count, seconds = 1, 0.0
    _pass_seconds(model, config, length, count)  # The first one is slower.
    while seconds < _WORTH_MENTIONING_S and count < piece:
        count = min(2 * count, piece)
        seconds = _pass_seconds(model, config, length, count)
        if seconds >= _WORTH_MENTIONING_S:  # So few pairs, or another process interfered.
            seconds = min(seconds, _pass_seconds(model, config, length, count))
    return (seconds or _pass_seconds(model, config, length, count)) / count * pairs


def _pass_seconds(model: UPPerson, config: TrainConfig, length: int, pairs: int) -> float:
    batch = _blank_batch(model, pairs, length)
    trained = [p for p in model.parameters() if p.requires_grad]
    started = time.perf_counter()
    with torch.enable_grad(), _autocast(model, config.precision):
        if config.accumulate > 1:
            with torch.no_grad():
                model(*batch)
        total = sum(features.float().sum() for features in model(*batch))
    torch.autograd.grad(total, trained, allow_unused=True)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _blank_batch(model: UPPerson, pairs: int, length: int) -> tuple[Tensor, Tensor]:
    """Return black images and captions of padding, on the model's device and of its type."""
    image_N3HW = torch.zeros(pairs, 3, *model.image_size, device=model.device, dtype=model.dtype)
    return image_N3HW, torch.zeros(pairs, length, dtype=torch.int64, device=model.device)


def _autocast(model: UPPerson, precision: MixedPrecision) -> torch.autocast:
    dtype = AUTOCAST_DTYPES.get(precision)
    return torch.autocast(model.device.type, dtype, enabled=precision != "fp32")


def count_split(records: Sequence[Record]) -> SplitCounts:
    """Count the images, captions and people of a split."""
    return SplitCounts(
        images=len(records),
        captions=sum(len(record.captions) for record in records),
        people=len({record.pid for record in records}),
    )


def count_parts(model: UPPerson) -> tuple[PartCount, ...]:
    """Count the trained parameters of each part, in both towers; parts left out have 0."""
    counts = {name: [0, 0] for name in TRAINED_PARTS.values()}
    for side, blocks in enumerate((model.image.blocks, model.text.blocks)):
        for block in blocks:
            for attribute, name in TRAINED_PARTS.items():
                if (module := getattr(block, attribute)) is not None:
                    trained = (p.numel() for p in module.parameters() if p.requires_grad)
                    counts[name][side] += sum(trained)
    return tuple(
        PartCount(part=name, image=image, text=text, total=image + text)
        for name, (image, text) in counts.items()
    )


def count_tokens(tokenizer: Tokenizer, captions: Sequence[str]) -> TokenLengths:
    """Tokenize captions, at least one, and count; InputError if one is empty."""
    batch = tokenizer.encode(captions)
    lengths = token_lengths(batch.input_ids)
    return TokenLengths(
        mean=float(lengths.mean()),
        longest=int(lengths.max()),
        limit=tokenizer.context_length,
        cut=len(batch.truncated),
    )


def measure_activations(
    model: UPPerson, length: int, precision: MixedPrecision, *, checkpointed: bool = False
) -> tuple[int, int]:
    """Measure what autograd keeps for the backward pass of a batch.

    Returns bytes for one pair with a caption of ``length`` tokens, and bytes whatever the batch is.
    Weights of the model are not in either. If a ``checkpointed`` model keeps only the blocks'
    inputs, the largest block, whose activations are computed again one block at a time, is added.
    """

    def towers(pairs: int) -> Sequence[Tensor]:
        features: tuple[Tensor, Tensor] = model(*_blank_batch(model, pairs, length))
        return features

    def one_block(
        block: nn.Module,
        tokens: int,
        width: int,
        mask: Tensor | None,
        rotary_2Ld: Tensor | None = None,
    ) -> _Forward:
        def run(pairs: int) -> Sequence[Tensor]:
            x_NLD = torch.zeros(pairs, tokens, width, device=model.device, requires_grad=True)
            return [block(x_NLD, mask, None, rotary_2Ld)]

        return run

    per_pair, fixed = _kept_bytes(model, towers, precision)
    if checkpointed:
        mask, tokens = model.text.mask, model.text.context_length  # Padded, unless causal.
        if mask is not None:
            mask, tokens = mask[:length, : model.text.prefix_length + length], length
        image_tokens, image_width = model.image.positional_embedding.shape
        text_width = model.text.positional_embedding.shape[1]
        forwards = [
            *(
                one_block(block, image_tokens, image_width, None, model.image.rotary)
                for block in model.image.blocks
            ),
            *(one_block(block, tokens, text_width, mask) for block in model.text.blocks),
        ]
        blocks = [_kept_bytes(model, forward, precision) for forward in forwards]
        per_pair += max(block[0] for block in blocks)
        fixed += max(block[1] for block in blocks)
    return per_pair, fixed


def _estimate_memory(
    components: Components, config: TrainConfig, length: int, pairs: int
) -> MemoryEstimate:
    model = components.model
    per_pair, fixed = measure_activations(
        model, length, config.precision, checkpointed=config.checkpoint_activations
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trained_bytes = _bytes_of([*trained, *components.objective.parameters()])
    return MemoryEstimate(
        frozen_bytes=_bytes_of(frozen) + _bytes_of(list(model.buffers())),
        trained_bytes=trained_bytes,
        gradient_bytes=trained_bytes,
        optimizer_bytes=_ADAM_MOMENTS * trained_bytes,
        copies_bytes=fixed,
        activation_bytes_per_pair=per_pair,
        pairs=pairs,
    )


def _kept_bytes(model: UPPerson, forward: _Forward, precision: MixedPrecision) -> tuple[int, int]:
    """Return the bytes autograd keeps for each pair, and those whatever their number is."""
    one, two = (_saved_bytes(model, forward, pairs, precision) for pairs in (1, 2))
    return two - one, one - (two - one)


def _saved_bytes(model: UPPerson, forward: _Forward, pairs: int, precision: MixedPrecision) -> int:
    """Run a forward pass and add up the storages autograd keeps, except the model's own."""
    own = {
        tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())
    }
    # The tensors are held until the end, so that no address is used twice.
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            saved[address] = tensor
        return tensor

    with (
        torch.enable_grad(),
        _autocast(model, precision),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        for output in forward(pairs):  # Alive until the backward pass, too.
            keep(output)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def _bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

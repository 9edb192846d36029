"""Pre-train the small CLIP that ships with the package, in two stages.

    upperson pretrain-small --output first.safetensors
    upperson pretrain-small --start first.safetensors --output upperson-small.safetensors

It sees synthetic people in the studio and *anywhere*: by cameras, framings and streets drawn anew
for each picture. Fine-tuning on the *street* look transfers such a frozen CLIP to five cameras it
never saw and to captions in sentences, as the product does with a real one. What CLIP knows of the
world from 400 million pictures it must learn here from a few: so every person comes with a
look-alike who differs in one attribute, texts are captions and short questions, and the loss knows
of which people of the batch a text is true.
"""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from safetensors.torch import save
from torch import Tensor, nn

from upperson.data.batches import pad_ids, tokenize
from upperson.data.vocabulary import clip_tokenizer
from upperson.model.base import SMALL, build_clip, load_base
from upperson.model.encoder import UPPerson
from upperson.model.parts import PLAIN_CLIP
from upperson_rt.encoder import Progress
from upperson_rt.files import write_atomically
from upperson_synthetic.captions import Caption, brief, caption
from upperson_synthetic.look import SOURCE, anywhere
from upperson_synthetic.people import Person, sample_look_alikes
from upperson_synthetic.sampling import chance
from upperson_synthetic.scene import encode_jpeg, render_person

_ANY = -1
_UNKNOWN = -2


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """How a base is made; the defaults are the first of the shipped file's two stages.

    That stage saw people as they were drawn before format 3, without profiles: made anew it gives
    another file.
    """

    start: Path | None = None  # A base to go on from, or None for random weights.
    people: int = 24_000  # In pairs who differ in one attribute; a batch takes both.
    views: int = 3  # Pictures of each person, rendered once.
    jpeg: bool = False  # Whether pictures have been through a JPEG file, as those of cameras have.
    gender_pairs: float = 24
    """How often the two of a pair differ in their gender: of `sample_look_alikes`."""

    steps: int = 6000
    batch_size: int = 128
    lr: float = 1.5e-3
    head_lr: float = 1.5e-3
    """Of the classifiers of attributes, which are new in every stage. Over a base they begin at
    once, and end at 0 in a straight line."""

    warmup_steps: int = 200
    weight_decay: float = 0.05
    attribute_weight: float = 4.0  # Of the attributes' cross entropy beside the contrastive loss.
    gender_weight: float = 1.0
    """Of a gender among the attributes: seen from behind or the side it is the hardest one."""

    seed: int = 7


def second_stage(start: Path) -> PretrainConfig:
    """How the shipped file was finished: people it had not met, JPEG files, and genders.

    The rate is low: a base whose logit scale is 100 loses within a hundred steps at the first
    stage's what it knows.
    """
    return PretrainConfig(
        start=start,
        people=12_000,
        views=4,
        jpeg=True,
        gender_pairs=40,
        steps=1500,
        lr=2e-4,
        head_lr=4e-3,
        warmup_steps=150,
        weight_decay=0.01,
        attribute_weight=2.0,
        gender_weight=3.0,
        seed=8,
    )


def pretrain_small(
    config: PretrainConfig, output: Path, rendering: Progress | None = None
) -> Iterator[tuple[int, float]]:
    """Train and write the base, yielding (step, contrastive loss) as it goes.

    Before the first step all people are rendered; `rendering` is called while it goes on.

    Every step draws pairs of people, one picture of each, and for each person a fresh caption and a
    fresh short question. The file is written after the last step: float16, embedding rows of tokens
    that no text reached set to zero, so that they pack to nothing and an unknown word says nothing.
    """
    torch.manual_seed(config.seed)
    clip = build_clip(SMALL) if config.start is None else load_base(SMALL, str(config.start)).clip
    rng = np.random.default_rng(config.seed)
    people = sample_look_alikes(config.people, rng, config.gender_pairs)
    pixels = _render(people, config, rng, rendering)
    attributes = _Attributes(people)
    rng = np.random.default_rng(config.seed)
    model = UPPerson(clip, PLAIN_CLIP, image_size=clip.visual.image_size)
    model.requires_grad_(True)
    heads = _Heads(
        clip.text_projection.shape[1], attributes.sizes, attributes.weights(config.gender_weight)
    )
    tokenizer = clip_tokenizer()
    parameters = [*clip.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": list(clip.parameters())}, {"params": list(heads.parameters())}],
        betas=(0.9, 0.98),
        weight_decay=config.weight_decay,
        fused=True,
    )
    seen_V = (clip.token_embedding.weight != 0).any(dim=1) & (config.start is not None)
    for step in range(config.steps):
        towers, classifiers = optimizer.param_groups
        towers["lr"] = config.lr * _warmup_cosine(step, config)
        straight = 1 - step / config.steps
        classifiers["lr"] = config.head_lr * (
            straight if config.start else _warmup_cosine(step, config)
        )
        with torch.no_grad():
            clip.logit_scale.fill_(math.log(_logit_scale(step, config)))
        first = 2 * rng.choice(len(people) // 2, config.batch_size // 2, replace=False)
        chosen = np.stack([first, first + 1], 1).ravel()
        views = rng.integers(config.views, size=config.batch_size)
        pixels_N3HW = torch.from_numpy(pixels[chosen, views]).permute(0, 3, 1, 2).float() / 255
        pixels_N3HW = _standardise(_augment(pixels_N3HW, rng))
        captions = [caption(people[index], SOURCE, rng) for index in chosen]
        briefs = [brief(people[index], rng) for index in chosen]
        ids = [
            pad_ids(tokenize(tokenizer, [text.text for text in texts]))
            for texts in (captions, briefs)
        ]
        for ids_NL in ids:
            seen_V[ids_NL] = True
        with torch.autocast("cpu", torch.bfloat16):
            image_NE = model.encode_image(pixels_N3HW)
            text_TE = torch.cat([model.encode_text(ids_NL) for ids_NL in ids])
        image_NE = F.normalize(image_NE.float(), dim=-1)
        text_TE = F.normalize(text_TE.float(), dim=-1)
        mentioned_TA, excluded_TA = attributes.of_texts([*captions, *briefs])
        has_NA = attributes.of_people[chosen]
        loss = _contrastive(
            clip.logit_scale.exp() * text_TE @ image_NE.T,
            _is_true(mentioned_TA, excluded_TA, has_NA),
        )
        known = (heads.loss(image_NE, has_NA) + heads.loss(text_TE, mentioned_TA)) / 2
        optimizer.zero_grad()
        total = loss + config.attribute_weight * known
        total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        yield step, loss.item()
    state = {name: tensor.half() for name, tensor in clip.state_dict().items()}
    state["token_embedding.weight"][~seen_V] = 0
    write_atomically(output, save(state))


def _render(
    people: list[Person],
    config: PretrainConfig,
    rng: np.random.Generator,
    progress: Progress | None = None,
) -> npt.NDArray[np.uint8]:
    """Render every person's pictures, uint8 [people, views, H, W, 3]."""
    width, height = SOURCE.width[0], SOURCE.height[0]
    pixels = np.empty((len(people), config.views, height, width, 3), np.uint8)
    for number, (person, pictures) in enumerate(zip(people, pixels, strict=True), 1):
        for picture in pictures:
            look = SOURCE if chance(rng, 0.2) else anywhere(rng)
            camera = look.cameras[int(rng.integers(len(look.cameras)))]
            image: Image.Image = render_person(person, look, rng, camera)
            if config.jpeg:
                image = JpegImageFile(io.BytesIO(encode_jpeg(image, camera)))
            picture[:] = image.resize((width, height), Image.Resampling.BILINEAR)
        if progress is not None:
            progress(number, len(people))
    return pixels


# --- What is true: A attributes of a person, as numbers of their values


class _Attributes:
    """The attributes of people and of texts as numbers.

    `_ANY` is an attribute that a text does not mention, `_UNKNOWN` an excluded value of no person.
    """

    def __init__(self, people: Sequence[Person]) -> None:
        self._names = [field.name for field in fields(Person) if field.name != "skin"]
        self._codes: list[dict[object, int]] = [{} for _ in self._names]
        for person in people:
            for name, codes in zip(self._names, self._codes, strict=True):
                codes.setdefault(getattr(person, name), len(codes))
        self.of_people = self._numbers([asdict(person) for person in people])
        """int64 [people, A]."""
        self.sizes = [len(codes) for codes in self._codes]

    def weights(self, gender: float) -> list[float]:
        """How much each attribute counts, where others than the gender count 1."""
        return [gender if name == "gender" else 1.0 for name in self._names]

    def of_texts(self, texts: Sequence[Caption]) -> tuple[Tensor, Tensor]:
        """The attributes that texts mention and exclude, int64 [T, A] each."""
        mentioned_TA = self._numbers([text.mentioned for text in texts])
        return mentioned_TA, self._numbers([text.excluded for text in texts])

    def _numbers(self, values: Sequence[Mapping[str, object]]) -> Tensor:
        columns = list(zip(self._names, self._codes, strict=True))
        return torch.tensor(
            [
                [codes.get(row[name], _UNKNOWN) if name in row else _ANY for name, codes in columns]
                for row in values
            ]
        )


def _is_true(mentioned_TA: Tensor, excluded_TA: Tensor, has_NA: Tensor) -> Tensor:
    """Return which people each text describes, bool [T, N]."""
    has_1NA, mentioned_T1A, excluded_T1A = has_NA[None], mentioned_TA[:, None], excluded_TA[:, None]
    agrees_TNA = (mentioned_T1A == _ANY) | (mentioned_T1A == has_1NA)
    return (agrees_TNA & (excluded_T1A != has_1NA)).all(dim=-1)


# --- Losses


def _contrastive(logits_TN: Tensor, true_TN: Tensor) -> Tensor:
    """InfoNCE both ways with all true pairs as positives, less what it is at best."""
    true_TN = true_TN.float()
    total = logits_TN.new_zeros(())
    for dim in (0, 1):
        count = true_TN.sum(dim)
        log_p_TN = logits_TN.log_softmax(dim)
        total = total - ((true_TN * log_p_TN).sum(dim) / count + count.log()).mean() / 2
    return total


class _Heads(nn.Module):
    """One linear classifier for each attribute, the same ones for pictures and texts.

    They are discarded at the end. They make both towers learn every attribute from the first step
    on, in the same direction of the space.
    """

    def __init__(self, width: int, sizes: list[int], weights: list[float]) -> None:
        super().__init__()
        self._sizes = sizes
        self._weights = weights
        self._linear = nn.Linear(width, sum(sizes))
        self._log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def loss(self, unit_NE: Tensor, values_NA: Tensor) -> Tensor:
        """Mean cross entropy of the attributes that are known, by their weights."""
        logits = self._linear(unit_NE * self._log_scale.exp()).split(self._sizes, dim=1)
        total, known = unit_NE.new_zeros(()), unit_NE.new_zeros(())
        columns = zip(logits, values_NA.T, self._weights, strict=True)
        for logits_NV, values_N, weight in columns:
            wrong = F.cross_entropy(logits_NV, values_N, ignore_index=_ANY, reduction="sum")
            total = total + weight * wrong
            known = known + weight * (values_N != _ANY).sum()
        return total / known


# --- Pictures


def _standardise(pixels_N3HW: Tensor) -> Tensor:
    mean_311 = torch.tensor(OPENAI_DATASET_MEAN).view(3, 1, 1)
    return (pixels_N3HW - mean_311) / torch.tensor(OPENAI_DATASET_STD).view(3, 1, 1)


def _augment(pixels_N3HW: Tensor, rng: np.random.Generator) -> Tensor:
    """Augment pictures in 0..1: shift, zoom, flip, tint, light and noise."""
    count = len(pixels_N3HW)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(shape or (count,)).uniform_(low, high)

    if rng.random() < 0.5:
        pixels_N3HW = pixels_N3HW.flip(3)
    affine_N23 = torch.zeros(count, 2, 3)
    zoom = between(0.95, 1.15)
    affine_N23[:, 0, 0] = zoom * between(0.94, 1.06)
    affine_N23[:, 1, 1] = zoom
    affine_N23[:, 0, 1] = between(-0.04, 0.04)
    affine_N23[:, 0, 2] = between(-0.06, 0.06)
    affine_N23[:, 1, 2] = between(-0.04, 0.04)
    grid = F.affine_grid(affine_N23, list(pixels_N3HW.shape), align_corners=False)
    pixels_N3HW = F.grid_sample(pixels_N3HW, grid, padding_mode="border", align_corners=False)
    gains = between(0.88, 1.12, count, 3, 1, 1) * between(0.85, 1.12, count, 1, 1, 1)
    noise = torch.randn_like(pixels_N3HW) * between(0, 0.012, count, 1, 1, 1)
    return (pixels_N3HW * gains + noise).clamp(0, 1)


# --- Schedules


def _warmup_cosine(step: int, config: PretrainConfig) -> float:
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def _logit_scale(step: int, config: PretrainConfig) -> float:
    """Rise from CLIP's initial 1 / 0.07 to its final 100 over the first half, then stay.

    CLIP learns its scale and ends at 100, so that its cosines differ by little. SDM relies on that:
    its fixed scale of 50 saturates on a base whose cosines are spread wide, and nothing is learned.
    """
    done = 1.0 if config.start else min(1.0, 2 * step / config.steps)
    return float((1 / 0.07) ** (1 - done) * 100**done)

"""Pre-train the small CLIP that ships with the package, from random weights.

    upperson pretrain-small --output upperson/assets/upperson-small.safetensors

Trained with symmetric InfoNCE on synthetic people of the *studio* look only, so that fine-tuning on
the *street* look transfers a frozen CLIP to a new domain, as the product does with a real one.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from torchvision.transforms import v2

from upperson.data.batches import pad_ids, tokenize
from upperson.data.synthetic.captions import describe
from upperson.data.synthetic.look import SOURCE
from upperson.data.synthetic.people import Person, sample_people
from upperson.data.synthetic.scene import render_person
from upperson.data.transforms import evaluation_transform
from upperson.data.vocabulary import clip_tokenizer
from upperson.model.base import SMALL, build_clip
from upperson.model.encoder import UPPerson
from upperson.model.parts import PLAIN_CLIP
from upperson_rt.files import write_atomically


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """How the small base was made; the defaults are the shipped file's."""

    people: int = 8000
    views: int = 2
    """Pictures of each person, rendered once."""

    steps: int = 1800
    batch_size: int = 128
    lr: float = 1.5e-3
    warmup_steps: int = 200
    weight_decay: float = 0.05
    seed: int = 7


def pretrain_small(config: PretrainConfig, output: Path) -> Iterator[tuple[int, float]]:
    """Train and write the base, yielding (step, loss) as it goes.

    Every step draws people, one of their pictures and a fresh caption. The file is written after
    the last step: float16, embedding rows of tokens that no caption reached set to zero, so that
    they pack to nothing and an unknown word says nothing.
    """
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    people = sample_people(config.people, rng)
    pixels = _render(people, config.views, rng)
    clip = build_clip(SMALL)
    model = UPPerson(clip, PLAIN_CLIP, image_size=clip.visual.image_size)
    model.requires_grad_(True)
    transform = v2.Compose([v2.RandomHorizontalFlip(), evaluation_transform()])
    tokenizer = clip_tokenizer()
    optimizer = torch.optim.AdamW(
        clip.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay
    )
    seen_V = torch.zeros(clip.vocab_size, dtype=torch.bool)
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * _warmup_cosine(step, config)
        with torch.no_grad():
            clip.logit_scale.fill_(math.log(_logit_scale(step, config)))
        chosen = rng.choice(len(people), config.batch_size, replace=False)
        views = rng.integers(config.views, size=config.batch_size)
        pixels_N3HW = torch.from_numpy(pixels[chosen, views]).permute(0, 3, 1, 2)
        ids_NL = pad_ids(
            tokenize(tokenizer, [describe(people[index], SOURCE, rng) for index in chosen])
        )
        seen_V[ids_NL] = True
        with torch.autocast("cpu", torch.bfloat16):
            image_NE = model.encode_image(torch.stack([transform(x) for x in pixels_N3HW]))
            text_NE = model.encode_text(ids_NL)
        loss = _info_nce(clip.logit_scale.exp() * text_NE @ image_NE.T)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        yield step, loss.item()
    state = {name: tensor.half() for name, tensor in clip.state_dict().items()}
    state["token_embedding.weight"][~seen_V] = 0
    write_atomically(output, save(state))


def _render(people: list[Person], views: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Render every person's pictures, uint8 [people, views, H, W, 3]."""
    return np.stack(
        [
            np.stack([np.asarray(render_person(person, SOURCE, rng)) for _ in range(views)])
            for person in people
        ]
    )


def _info_nce(logits_NN: Tensor) -> Tensor:
    target_N = torch.arange(len(logits_NN))
    return (F.cross_entropy(logits_NN, target_N) + F.cross_entropy(logits_NN.T, target_N)) / 2


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
    done = min(1.0, 2 * step / config.steps)
    return float((1 / 0.07) ** (1 - done) * 100**done)

"""Distil a run's image tower into a smaller one.

The student learns to embed pictures as its teacher does; captions are not needed. The text tower
and the embedding space stay the teacher's. The results are measured on the saved files, as in
training.

Shapes: N pictures, E embedding width.
"""

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from upperson.checkpoint import Checkpointer, RunState, identity_of
from upperson.components import start_accelerator
from upperson.config import TrainConfig, require_settings
from upperson.data.batches import (
    BatchSampler,
    LoadedBatch,
    PairDataset,
    pair_loader,
    usable_workers,
)
from upperson.data.images import truncated_images
from upperson.data.pictures import PictureBatches, Pictures, pixels_of
from upperson.data.records import Record, read_dataset
from upperson.data.transforms import PixelStatistics, flips_only, prepare_pixels
from upperson.evaluate import evaluate
from upperson.model.encoder import ImageEncoder
from upperson.model.student import build_student, read_size, start_from_teacher
from upperson.observer import Observer
from upperson.run import LAST, load_run, space_of_run
from upperson.run_writer import RunWriter
from upperson.trainer import Trainer, TrainResult, pictures_of
from upperson_rt.encoder import Progress
from upperson_rt.errors import InputError, IntegrityError, UppersonError, UsageError
from upperson_rt.preprocess import iter_image_files
from upperson_rt.strict import read_fields
from upperson_rt.tokenizer import Tokenizer


class Teacher:
    """Makes the embeddings that a student learns, with a tower on its device.

    Augmented pictures are new at every step, so it embeds each batch as the student sees it.
    Pictures that are only flipped have two versions: `embed_all` embeds them once, before the first
    step, which halves the work.

    Shapes: P pictures, N of a batch.
    """

    def __init__(self, tower: ImageEncoder, statistics: PixelStatistics) -> None:
        self._tower = tower
        self._statistics = statistics
        self._target_2PE: Tensor | None = None

    @torch.no_grad()
    def embed_all(self, pictures: Pictures, batch_size: int, progress: Progress) -> None:
        """Embed every picture and its mirror image, so many at a time, and keep the embeddings.

        A batch's labels are then indices into them. InputError if one cannot be decoded.
        ``progress`` is called with the pictures done and in all.
        """
        tower, count = self._tower, len(pictures)
        device = tower.positional_embedding.device
        places = torch.split(torch.arange(count), batch_size)
        assert tower.proj is not None  # No student is built for a tower without.
        # Filled in place: autocast on a CPU cannot concatenate float16.
        target_2PE = torch.empty(2, count, tower.proj.shape[1], dtype=torch.float16, device=device)
        batches = PictureBatches(pictures, [each.tolist() for each in places])
        for number, place in enumerate(places):
            item = batches[number]
            if isinstance(item, UppersonError):
                raise item
            image_N3HW = prepare_pixels(pixels_of(item).to(device), None, self._statistics)
            for side, image in enumerate((image_N3HW, image_N3HW.flip(3))):
                target_2PE[side, place] = F.normalize(tower(image).float(), dim=-1).half()
            progress(int(place[-1]) + 1, count)
        self._target_2PE = target_2PE

    @torch.no_grad()
    def targets(self, loaded: LoadedBatch, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return a batch's normalised pictures [N, 3, H, W] and their unit-norm targets [N, E]."""
        if self._target_2PE is None:
            image_N3HW = loaded.to(device, self._statistics).image_N3HW
            return image_N3HW, F.normalize(self._tower(image_N3HW).float(), dim=-1)
        assert loaded.augmentation_N7 is not None
        flipped = loaded._replace(augmentation_N7=flips_only(loaded.augmentation_N7))
        batch = flipped.to(device, self._statistics)
        flipped_N = loaded.augmentation_N7[:, 0].to(device)
        return batch.image_N3HW, self._target_2PE[flipped_N, batch.labels_N].float()


ADAM_EPS = 1e-8
"""All weights of a student are trained from a rough start: no reason for the large one of parts."""


def student_config(
    teacher_path: Path, size: str, pictures: tuple[Path, ...], settings: dict[str, Any]
) -> TrainConfig:
    """Return the configuration of a student's run: its teacher's, with ``settings`` replaced.

    ``size`` is ``BLOCKSxWIDTH`` or ``BLOCKSxWIDTH@HEIGHTxWIDTH``; ``pictures`` are files and
    folders of pictures without captions.

    Raises:
        UsageError: The student is not smaller than its teacher, or a setting is out of range.
        InputError: The teacher is no run, or a picture is not there.
    """
    require_settings(settings)
    teacher = load_run(teacher_path)
    image_size = (teacher.config.height_px, teacher.config.width_px)
    wanted, before = read_size(size), teacher.config.student
    if wanted.patch_px is None and before is not None:
        wanted = wanted._replace(patch_px=read_size(before.size).patch_px)
    build_student(teacher.model.image, wanted, image_size)  # Refuses what cannot be.
    for path in pictures:
        next(iter_image_files([path]))
    brought = teacher_path / str(teacher.config.pretrained)
    content = (
        asdict(teacher.config)
        | settings
        | {
            "init_from": None,
            "kept_share": 1.0,  # The text tower comes as its teacher saved it.
            "adam_eps": ADAM_EPS,
            "student": {
                "size": str(wanted),
                "teacher": str(teacher_path.absolute()),
                "space": space_of_run(teacher_path, teacher),
                "pictures": [str(path.absolute()) for path in pictures],
            },
        }
    )
    if brought.is_file():
        content["pretrained"] = str(brought.absolute())
    return read_fields(TrainConfig, content, "upperson distill")


def distill(
    config: TrainConfig,
    run_path: Path,
    observer: Observer,
    *,
    device: str = "auto",
    resume: bool = False,
) -> TrainResult:
    """Distil a student into a run folder; the last epoch is kept.

    With ``resume`` the run in the folder continues from its newest checkpoint.

    Raises:
        UsageError: Several processes, or a configuration without a student.
        InputError, BackendError, IntegrityError: As training raises them, or the teacher has
            changed since the run began.
    """
    started = time.perf_counter()
    if config.student is None:
        raise UsageError(
            "the configuration names no student: make it with  upperson distill RUN",
            code="no_student",
        )
    with ExitStack() as closing:
        closing.enter_context(truncated_images(config.load_truncated))
        accelerator = start_accelerator(config.precision, device)
        if accelerator.num_processes > 1:
            raise UsageError(
                "distilling takes one process: start it without torchrun", code="several_processes"
            )
        run = load_run(Path(config.student.teacher))
        if space_of_run(Path(config.student.teacher), run) != config.student.space:
            raise IntegrityError(
                f"{config.student.teacher} is not the run that this student began with: put the "
                "original in place, or distil a new student",
                code="teacher_changed",
                path=config.student.teacher,
            )
        splits = read_dataset(config.dataset, Path(config.root))
        model, teacher = run.model, run.model.image
        torch.manual_seed(config.seed)
        student = build_student(teacher, read_size(config.student.size), model.image_size)
        start_from_teacher(student, teacher, model.image_size)
        model.image = student.requires_grad_(True)
        model.to(accelerator.device)
        teacher.to(accelerator.device).requires_grad_(False)
        tokenizer = run.base.tokenizer()
        pictures = _pictures_of(config, splits["train"], observer)
        loader, sampler = _picture_loader(config, pictures, tokenizer, accelerator.device)
        if accelerator.device.type == "cpu":
            # Of some tens of tokens the gradients of written-out attention are the faster ones.
            closing.enter_context(sdpa_kernel(SDPBackend.MATH))

        optimizer: Any = torch.optim.AdamW(
            [{"params": list(student.parameters()), "peak_lr": config.lr}],
            lr=config.lr,
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        trained, optimizer = accelerator.prepare(student, optimizer)
        identity = identity_of(config, run.base.sha256, splits)
        student_parts = nn.ModuleDict({"image": student})
        trainer = Trainer(
            path=run_path,
            config=config,
            splits=splits,
            tokenizer=tokenizer,
            accelerator=accelerator,
            writer=RunWriter(run_path, config, run.base, model, resume=resume),
            checkpointer=Checkpointer(
                run_path / LAST, student_parts, optimizer, accelerator.scaler, identity
            ),
            observer=observer,
            optimizer=optimizer,
            sampler=sampler,
            started=started,
        )
        if resume:
            trainer.resume()
        closing.callback(trainer.writer.close)
        trainer.begin()
        teaching = Teacher(teacher, model.statistics)
        if not config.augment and trainer.state.epoch < config.epochs:
            with accelerator.autocast():
                teaching.embed_all(pictures, config.batch_size, observer.teaching)
        trainer.fit(loader, _Distillation(trainer, teaching, trained))

        trainer.state.best_epoch = config.epochs
        trainer.writer.save_adapter(model.trained_state())
        measured = trainer.measure()
        model.image = teacher
        facts: dict[str, Any] = {
            "operations": operations(student, model.image_size),
            "teacher_operations": operations(teacher, model.image_size),
            "teacher": {
                name: evaluate(model, tokenizer, splits[name]).text_to_image.as_dict()
                for name in measured
            },
        }
        return trainer.finish("last epoch", measured, facts)


@dataclass
class _Distillation:
    """The `Method` that learns a teacher's embeddings of pictures."""

    trainer: Trainer
    teacher: Teacher
    student: nn.Module

    def start_epoch(self, state: RunState) -> None:
        self.student.train()

    def step(self, batch: LoadedBatch, step: int) -> tuple[Tensor, int]:
        accelerator, optimizer = self.trainer.accelerator, self.trainer.optimizer
        with accelerator.autocast():
            image_N3HW, target_NE = self.teacher.targets(batch, accelerator.device)
            loss = distance(self.student(image_N3HW), target_NE)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        return loss.detach(), len(image_N3HW)

    def end_epoch(self, trainer: Trainer) -> dict[str, float]:
        return {}


def distance(student_NE: Tensor, target_NE: Tensor) -> Tensor:
    """Return the mean of 1 - cosine between a student's features and unit-norm embeddings."""
    return (1 - (F.normalize(student_NE.float(), dim=-1) * target_NE).sum(dim=-1)).mean()


def operations(tower: ImageEncoder, image_size: tuple[int, int]) -> int:
    """Count the multiplications and additions of a tower for one picture."""
    device = tower.positional_embedding.device
    # Of fused attention on a CPU nothing would be counted.
    written_out = sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), written_out:
        tower(torch.zeros(1, 3, *image_size, device=device))
    return int(counter.get_total_flops())


def _pictures_of(config: TrainConfig, records: list[Record], observer: Observer) -> Pictures:
    """Return the pictures of the training split and the others."""
    assert config.student is not None
    files = [record.image for record in records]
    if config.student.pictures:
        files += iter_image_files([Path(name) for name in config.student.pictures])
    if not files:
        raise InputError(
            f"{config.root} has no image in split 'train': add some with  --images",
            code="split_empty",
            split="train",
        )
    (pictures,) = pictures_of(config, [files], (config.height_px, config.width_px), observer)
    return pictures


def _picture_loader(
    config: TrainConfig, pictures: Pictures, tokenizer: Tokenizer, device: torch.device
) -> tuple[Any, BatchSampler]:
    """Load pictures in batches whose labels are their indices; the captions are not used."""
    sampler = BatchSampler(len(pictures), config.batch_size, config.seed)
    pairs = PairDataset(
        [Record(image=Path(), pid=i, captions=("a person",)) for i in range(len(pictures))],
        pictures,
        tokenizer,
        augment=True,
        mask_captions=False,
    )
    workers = usable_workers(config.workers, config.batch_size * pictures.transfer_bytes)
    return pair_loader(pairs, sampler, device, workers), sampler

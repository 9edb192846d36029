"""Fine-tune the trained parts of UP-Person on pairs of image and caption.

The epoch with the best R@1 on the selection split is kept. The results are measured on the saved
files, in float32, as every later command loads them.
"""

import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from upperson.checkpoint import Checkpointer, RunState, identity_of
from upperson.components import (
    NO_BF16,
    Components,
    Splits,
    build_components,
    choose_device,
    start_accelerator,
    usable_precision,
)
from upperson.config import TrainConfig, settings_from
from upperson.data.batches import (
    BatchSampler,
    LoadedBatch,
    PairDataset,
    pair_loader,
    usable_workers,
)
from upperson.data.images import truncated_images
from upperson.data.pictures import Pictures
from upperson.data.records import Split
from upperson.division import matching_losses, noisy_pairs
from upperson.evaluate import Embeds, embed_records, pids_of, rank_and_average
from upperson.observer import Observer
from upperson.plan import expected_step_s
from upperson.run import CONFIG, LAST, start_from
from upperson.run_writer import RunWriter
from upperson.step import COMPILED_LENGTHS, backward_through_batch, build_optimizer, compile_blocks
from upperson.trainer import Trainer, TrainResult, pictures_of
from upperson_rt.errors import InputError, UsageError
from upperson_rt.tokenizer import Tokenizer


def train(
    config: TrainConfig,
    run_path: Path,
    observer: Observer,
    *,
    device: str = "auto",
    resume: bool = False,
) -> TrainResult:
    """Train one run into a run folder.

    With ``resume`` the run in the folder continues from its newest checkpoint and ends as if it had
    never stopped: bit for bit on a CPU with as many threads.

    Raises:
        UsageError, InputError: The base, the recipe or the data cannot be used; nothing is written.
        BackendError: The device or the precision is not available.
        IntegrityError: Data or base differ from those of the run to resume.
        InputError: As `Trainer.fit` raises it.
    """
    started = time.perf_counter()
    with ExitStack() as closing:
        closing.enter_context(truncated_images(config.load_truncated))
        precision = usable_precision(config.precision, choose_device(device))
        accelerator = start_accelerator(precision, device)
        main = accelerator.is_main_process
        if precision != config.precision:
            config = replace(config, precision=precision)
            if main:
                observer.note(NO_BF16)
        if config.batch_size < accelerator.num_processes:
            raise UsageError(
                f"batch_size ({config.batch_size}) must be at least the number of processes "
                f"({accelerator.num_processes}): each needs a pair",
                code="batch_size_too_small",
                batch_size=config.batch_size,
                processes=accelerator.num_processes,
            )
        with settings_from(run_path / CONFIG) if resume else nullcontext():
            components = build_components(config)
        splits, model = components.splits, components.model
        trained = nn.ModuleDict({"model": model, "objective": components.objective})
        writer = RunWriter(run_path, config, components.base, trained, resume=resume)
        files = [[record.image for record in records] for records in splits.values()]
        found = pictures_of(config, files, model.image_size, observer)
        pictures = dict(zip(splits, found, strict=True))
        pairs = PairDataset(
            splits["train"],
            pictures["train"],
            components.tokenizer,
            augment=config.augment,
            mask_captions=config.mask_captions,
            shorten_captions=config.shorten_captions,
            wrong_captions=config.wrong_captions,
            length_step=COMPILED_LENGTHS if config.compile else 1,
        )
        sampler = BatchSampler(
            len(pairs),
            config.batch_size,
            config.seed,
            accelerator.process_index,
            accelerator.num_processes,
        )
        share = max(sampler.share_sizes(0))
        batch_bytes = share * pictures["train"].transfer_bytes
        workers = _workers(config, batch_bytes, observer if main else None)
        loader = pair_loader(pairs, sampler, accelerator.device, workers)

        trained.to(accelerator.device)
        optimizer = build_optimizer(trained.named_parameters(), config)
        step_s = expected_step_s(model, config, length=pairs.longest, pairs=share) if main else 0.0
        if config.compile:
            compile_blocks(model)
        towers, optimizer = accelerator.prepare(model, optimizer)
        identity = identity_of(config, components.base.sha256, splits)
        trainer = Trainer(
            path=run_path,
            config=config,
            splits=splits,
            tokenizer=components.tokenizer,
            accelerator=accelerator,
            writer=writer,
            checkpointer=Checkpointer(
                run_path / LAST, trained, optimizer, accelerator.scaler, identity
            ),
            observer=observer,
            optimizer=optimizer,
            sampler=sampler,
            started=started,
        )
        if main:
            for line in components.notes:
                observer.note(line)
            _note_cut_captions(splits, components.tokenizer, observer)
        if resume:
            trainer.resume()
        if config.init_from is not None and trainer.steps == 0:
            start_from(Path(config.init_from), model, components.base, config.model)
            if main:
                observer.note(f"starting from the trained tensors of {config.init_from}")
        accelerator.wait_for_everyone()
        closing.callback(writer.close)
        trainer.begin()
        if main and (left := config.epochs * len(sampler) - trainer.steps):
            observer.expecting(step_s, left)
        pair_training = _PairTraining(trainer, components, towers, pictures)
        trainer.fit(loader, pair_training)
        return trainer.finish(pair_training.selecting or "last epoch", trainer.measure(pictures))


@dataclass
class _PairTraining:
    """The `Method` that learns from pairs of image and caption."""

    trainer: Trainer
    components: Components
    towers: nn.Module  # The model, as accelerate prepared it.
    pictures: dict[Split, Pictures]

    @property
    def selecting(self) -> Split | None:
        """The split that selects the best epoch; without one the last epoch is kept."""
        split = self.trainer.config.select_on
        return split if self.components.splits[split] else None

    def start_epoch(self, state: RunState) -> None:
        config = self.trainer.config
        if config.leave_out_noisy and state.epoch >= config.warmup_epochs and state.step == 0:
            try:
                state.left_out = self._find_noisy(state.epoch)
            except InputError as error:
                raise self.trainer.input_error(error) from error
            if self.trainer.main:
                self.trainer.observer.note(
                    f"epoch {state.epoch + 1}: {len(state.left_out)} pairs left out as noisy"
                )
        self.components.model.train()

    def step(self, batch: LoadedBatch, step: int) -> tuple[Tensor, int]:
        accelerator, optimizer = self.trainer.accelerator, self.trainer.optimizer
        share = batch.to(accelerator.device, self.components.model.statistics)
        sizes = self.trainer.sampler.share_sizes(step)
        optimizer.zero_grad()
        loss = backward_through_batch(
            accelerator,
            self.towers,
            self.components.objective,
            share,
            sizes,
            self.trainer.config.accumulate,
        )
        optimizer.step()
        return loss, sum(sizes)

    def end_epoch(self, trainer: Trainer) -> dict[str, float]:
        config, state, model = trainer.config, trainer.state, self.components.model
        epoch, selecting = state.epoch, self.selecting
        last = epoch + 1 == config.epochs
        row: dict[str, float] = {}
        if config.leave_out_noisy:
            row["left out"] = len(state.left_out)
        r1 = None
        if selecting is not None and ((epoch + 1) % config.eval_every == 0 or last):
            with model.keeping(config.kept_share):
                embeds = self._embed(selecting)
            if trainer.main:
                device = trainer.accelerator.device
                pids = pids_of(self.components.splits[selecting])
                metrics = rank_and_average(*embeds, *pids, device)
                trainer.observer.evaluated(epoch, selecting, metrics)
                row |= {f"{selecting} {name}": value for name, value in metrics.as_dict().items()}
                r1 = metrics.r1
        if trainer.main and (last if selecting is None else r1 is not None and r1 > state.best_r1):
            with model.keeping(config.kept_share):
                best = model.trained_state()
            trainer.keep_best(best, r1)
        return row

    def _find_noisy(self, epoch: int) -> list[int]:
        """Find the noisy training pairs under the current model; the same on all processes."""
        config = self.trainer.config
        records = self.components.splits["train"]
        text_PE, image_GE = self._embed("train")
        image_PE = np.repeat(image_GE, [len(record.captions) for record in records], axis=0)
        pids_P, _ = pids_of(records)
        losses_P = matching_losses(
            text_PE, image_PE, pids_P, config.batch_size, config.temperature, [config.seed, epoch]
        )
        found: list[list[int]] = [noisy_pairs(losses_P).tolist()]
        broadcast_object_list(found)
        return found[0]

    def _embed(self, split: Split) -> tuple[Embeds, Embeds]:
        """Embed a split with the model as it is; the processes share the work."""
        config = self.trainer.config
        # Eagerly: compiled blocks would be compiled again for other batches than the training's.
        eager = torch.compiler.set_stance("force_eager") if config.compile else nullcontext()
        with self.trainer.accelerator.autocast(), eager:
            return embed_records(
                self.components.model,
                self.trainer.tokenizer,
                self.components.splits[split],
                workers=config.workers,
                pictures=self.pictures[split],
                together=True,
            )


def _workers(config: TrainConfig, batch_bytes: int, observer: Observer | None) -> int:
    """Return the number of loader processes; note it if shared memory allows fewer."""
    workers = usable_workers(config.workers, batch_bytes)
    if observer is not None and workers < usable_workers(config.workers, 1):
        observer.note(
            f"{workers} of {config.workers} loader processes: no more batches fit into /dev/shm; "
            "give it a gigabyte, for example with  docker run --shm-size 1g"
        )
    return workers


def _note_cut_captions(splits: Splits, tokenizer: Tokenizer, observer: Observer) -> None:
    captions = [text for split in splits.values() for row in split for text in row.captions]
    if cut := len(tokenizer.encode(captions).truncated):
        observer.note(
            f"{cut} of {len(captions)} captions are longer than {tokenizer.context_length} tokens "
            "and are cut there"
        )

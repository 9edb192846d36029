"""Fine-tune the trained parts of UP-Person, top to bottom in one file.

The epoch with the best R@1 on the selecting split is kept. What a run reports at its end is
measured on the files it leaves behind, in float32, exactly as anyone who loads them will.
"""

import math
import time
from collections import deque
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from upperson.checkpoint import Checkpointer, identity_of
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
from upperson.data.batches import BatchSampler, PairDataset, pair_loader, usable_workers
from upperson.data.images import truncated_images
from upperson.data.pictures import Pictures, cached_pictures
from upperson.data.records import Split
from upperson.division import find_noisy
from upperson.evaluate import embed_records, pids_of, rank_and_average
from upperson.observer import Observer
from upperson.ongoing import OngoingRun, TrainResult
from upperson.plan import expected_step_s
from upperson.run import CONFIG, LAST, start_from
from upperson.run_writer import RunWriter
from upperson.step import (
    COMPILED_LENGTHS,
    backward_through_batch,
    build_optimizer,
    compile_blocks,
    set_learning_rate,
)
from upperson_rt.errors import InputError, UppersonError, UsageError
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

    With ``resume`` the run in the folder goes on from its newest checkpoint and ends as if it had
    never stopped: bit for bit on a CPU with as many threads.

    Raises:
        UsageError, InputError: The base, the recipe or the data cannot be used; nothing is written.
        BackendError: The device or the precision is not available.
        IntegrityError: Data or base are not those that the run to resume began with.
        InputError: The loss is not finite, an image cannot be decoded, or the disk is full; the
            last checkpoint and the best epoch so far stay in the run folder.
    """
    with ExitStack() as closing:
        return _train(config, run_path, observer, device, resume, closing)


def _train(
    config: TrainConfig,
    run_path: Path,
    observer: Observer,
    device: str,
    resume: bool,
    closing: ExitStack,
) -> TrainResult:
    started = time.perf_counter()
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
            f"({accelerator.num_processes}): each needs a pair"
        )
    with settings_from(run_path / CONFIG) if resume else nullcontext():
        components = build_components(config)
    splits, model, tokenizer = components.splits, components.model, components.tokenizer
    # Without a split to select on the last epoch is kept.
    selecting = config.select_on if splits[config.select_on] else None
    objective = components.objective
    trained = nn.ModuleDict({"model": model, "objective": objective})
    writer = RunWriter(run_path, config, components.base, trained, resume=resume)
    pictures = _pictures_of(config, splits, model.image_size, observer)
    pairs = PairDataset(
        splits["train"],
        pictures["train"],
        tokenizer,
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
    batch_bytes = share * pictures["train"].handed_bytes
    workers = _workers(config, batch_bytes, observer if main else None)
    loader = pair_loader(pairs, sampler, accelerator.device, workers)

    trained.to(accelerator.device)
    optimizer = build_optimizer(trained.named_parameters(), config)
    step_s = expected_step_s(model, config, length=pairs.longest, pairs=share) if main else 0.0
    if config.compile:
        compile_blocks(model)
    towers, optimizer = accelerator.prepare(model, optimizer)
    identity = identity_of(config, components.base.sha256, splits)
    run = OngoingRun(
        path=run_path,
        config=config,
        splits=splits,
        tokenizer=tokenizer,
        accelerator=accelerator,
        writer=writer,
        checkpointer=Checkpointer(
            run_path / LAST, trained, optimizer, accelerator.scaler, identity
        ),
        observer=observer,
        epoch_steps=len(sampler),
        started=started,
    )
    if main:
        for line in components.notes:
            observer.note(line)
        _tell_cut_captions(splits, tokenizer, observer)
    if resume:
        run.resume()
    state = run.state
    if config.init_from is not None and run.steps == 0:
        start_from(Path(config.init_from), model, components.base, config.model)
        if main:
            observer.note(f"starting from the trained tensors of {config.init_from}")
    accelerator.wait_for_everyone()
    closing.callback(writer.close)
    run.begin()
    if main and (left := config.epochs * len(sampler) - run.steps):
        observer.expecting(step_s, left)

    waiting: deque[tuple[int, Tensor, int]] = deque()

    def read_losses(late: int) -> None:
        """Read the losses of all steps but the last few, and tell them."""
        while len(waiting) > late:
            number, tensor, count = waiting.popleft()
            loss = float(tensor)
            if not math.isfinite(loss):
                raise InputError(
                    f"the loss became {loss} in epoch {state.epoch + 1}, step {number}: start a "
                    f"new run with a lower lr ({config.lr}) or prefix_scale "
                    f"({config.model.prefix_scale}); the best epoch so far, if there is one, is "
                    f"kept in {run_path}"
                )
            run.tell_step(number, loss, rate, count)

    # A GPU is told of the next step before anybody waits for the loss of this one.
    late = 1 if accelerator.device.type == "cuda" else 0
    while state.epoch < config.epochs:
        epoch = state.epoch
        rate = set_learning_rate(optimizer, epoch, config)
        if config.leave_out_noisy and epoch >= config.warmup_epochs and state.step == 0:
            try:
                state.left_out = _find_noisy(config, components, pictures, accelerator, epoch)
            except InputError as error:
                raise InputError(
                    f"{error} (epoch {epoch + 1}, step 1): mend it, then go on with --resume "
                    f"{run_path}"
                ) from error
            if main:
                observer.note(f"epoch {epoch + 1}: {len(state.left_out)} pairs left out as noisy")
        model.train()
        sampler.start_at(epoch, state.step, state.left_out)
        run.start_lap()
        for item in loader:
            if isinstance(item, UppersonError):
                read_losses(0)
                run.save()
                raise InputError(
                    f"{item} (epoch {epoch + 1}, step {state.step + 1}): mend it, then go on with "
                    f"--resume {run_path}"
                )
            batch = item.to(accelerator.device, model.statistics)
            sizes = sampler.share_sizes(state.step)
            optimizer.zero_grad()
            loss = backward_through_batch(
                accelerator, towers, objective, batch, sizes, config.accumulate
            )
            optimizer.step()
            state.step += 1
            waiting.append((state.step, loss, sum(sizes)))
            # Before an evaluation, too: a picture of its split may turn out broken.
            keep = state.step % config.checkpoint_every == 0 or state.step == len(sampler)
            read_losses(0 if keep else late)
            if keep:
                run.save()

        last = epoch + 1 == config.epochs
        embeds = None
        if selecting is not None and ((epoch + 1) % config.eval_every == 0 or last):
            keeping = model.keeping(config.kept_share)
            with accelerator.autocast(), _uncompiled(config), keeping:
                embeds = embed_records(
                    model,
                    tokenizer,
                    splits[selecting],
                    workers=config.workers,
                    pictures=pictures[selecting],
                    together=True,
                )
        row = {"epoch": epoch + 1, "lr": rate, "loss": state.loss_sum / state.step}
        if config.leave_out_noisy:
            row["left out"] = len(state.left_out)
        r1 = None
        if main and selecting is not None and embeds is not None:
            metrics = rank_and_average(*embeds, *pids_of(splits[selecting]), accelerator.device)
            observer.evaluated(epoch, selecting, metrics)
            row |= {f"{selecting} {name}": value for name, value in metrics.as_dict().items()}
            r1 = metrics.r1
        if main and (last if selecting is None else r1 is not None and r1 > state.best_r1):
            with model.keeping(config.kept_share):
                best = model.trained_state()
            run.keep_best(best, r1)
        run.end_epoch(row)
        accelerator.wait_for_everyone()

    return run.finish(selecting or "last epoch", run.measure(pictures))


def _find_noisy(
    config: TrainConfig,
    components: Components,
    pictures: dict[Split, Pictures],
    accelerator: Accelerator,
    epoch: int,
) -> list[int]:
    """Divide the training pairs by what the model makes of them now; the same on all processes."""
    with accelerator.autocast(), _uncompiled(config):
        found = [
            find_noisy(
                components.model,
                components.tokenizer,
                components.splits["train"],
                config.batch_size,
                config.temperature,
                seed=[config.seed, epoch],
                workers=config.workers,
                pictures=pictures["train"],
                together=True,
            )
        ]
    broadcast_object_list(found)
    return found[0]


def _pictures_of(
    config: TrainConfig, splits: Splits, image_size: tuple[int, int], observer: Observer
) -> dict[Split, Pictures]:
    files = {split: [record.image for record in records] for split, records in splits.items()}
    if config.cache is None:
        return {split: Pictures(images, image_size) for split, images in files.items()}
    found = cached_pictures(
        Path(config.cache), Path(config.root), list(files.values()), image_size, observer.caching
    )
    return dict(zip(files, found, strict=True))


def _workers(config: TrainConfig, batch_bytes: int, observer: Observer | None) -> int:
    """Return the loader processes of this one; say so if shared memory holds fewer."""
    workers = usable_workers(config.workers, batch_bytes)
    if observer is not None and workers < usable_workers(config.workers, 1):
        observer.note(
            f"{workers} of {config.workers} loader processes: no more batches fit into /dev/shm; "
            "give it a gigabyte, for example with  docker run --shm-size 1g"
        )
    return workers


def _uncompiled(config: TrainConfig) -> AbstractContextManager[object]:
    """Run compiled blocks as they are: evaluation would have them compiled for its batches, too."""
    return torch.compiler.set_stance("force_eager") if config.compile else nullcontext()


def _tell_cut_captions(splits: Splits, tokenizer: Tokenizer, observer: Observer) -> None:
    captions = [text for split in splits.values() for row in split for text in row.captions]
    if cut := len(tokenizer.encode(captions).truncated):
        observer.note(
            f"{cut} of {len(captions)} captions are longer than {tokenizer.context_length} tokens "
            "and are cut there"
        )

"""Kills commands at random moments, again and again, and looks at what they leave.

    python -m tests.helpers.kills export import train watch shard merge --trials 50

Each trial is a process of its own that gets SIGKILL somewhere between its begin and its end. What
it should have left alone must be there, what it leaves must open, and the next command must go on
from it. How many trials ended in which way is printed; anything of `BAD` counts against it.
"""

import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.command_line import run_program, start_program
from tests.helpers.invoke import snapshot
from tests.helpers.official_checkpoint import know_toy_base, save_official
from tests.helpers.toy_bundle import COLOURS, draw_person, make_toy_bundle
from tests.helpers.toy_clip import IMAGE_SIZE
from tests.helpers.toy_graphs import export_exchanged, load_toy_graphs
from tests.helpers.toy_run import toy_config
from tests.helpers.trials import parse, report
from upperson_rt.bundle import Bundle, open_encoder
from upperson_rt.errors import UppersonError
from upperson_rt.gallery import Gallery
from upperson_shards.indexing import choose_files, index_shard
from upperson_shards.merge import merge_shards
from upperson_shards.records import Shard, ShardRecord
from upperson_synthetic.video import VideoSpec, write_video

BAD = ("lost", "wrong", "raw error", "leftovers")
TRAIN = (
    *("train", "--root", "people", "--base", "toy", "--pretrained", "toy.safetensors"),
    *("--recipe", "synthetic", "--output", "run"),
    *(
        f"--set={setting}"
        for setting in (
            f"height_px={IMAGE_SIZE[0]}", f"width_px={IMAGE_SIZE[1]}", "model.prefix_length=3",
            "model.prefix_blocks=all", "model.lora_rank=4", "model.adapter_reduction=4",
            "batch_size=8", "epochs=3", "warmup_epochs=1", "checkpoint_every=1", "workers=0",
        )
    ),
)  # fmt: skip
EXPORT = ("export", "run", "--output", "bundle", "--calib-size", "8", "--max-r1-drop", "100")
IMPORT = (
    *("import", "best.pth", "--output", "imported", "--base", "toy"),
    *("--height", f"{IMAGE_SIZE[0]}", "--width", f"{IMAGE_SIZE[1]}"),
)
WATCH = (
    *("watch", "street.avi", "--detector", "street.json", "-b", "bundle", "-g", "gallery"),
    *("--threads", "1", "--backend", "onnxruntime", "--batch-size", "2", "--every", "0.2"),
    *("--start", "1800000000"),
)
_MOST_KILLS_OF_A_RUN = 3


class Command:
    """Runs a command in forked processes: what it imports is there, so kills hit its work."""

    def __init__(
        self, arguments: tuple[str, ...], rng: np.random.Generator, module: str = "upperson.cli"
    ) -> None:
        self.arguments = arguments
        self._rng = rng
        self._module = module
        began = time.monotonic()
        code, log = self.run()
        assert code == 0, log
        self.seconds = time.monotonic() - began

    def run(self, kill: bool = False, arguments: tuple[str, ...] = ()) -> tuple[int, str]:
        """Return exit code (-9 if it was killed in time) and what was printed."""
        after_s = float(self._rng.uniform(0, 1.05 * self.seconds)) if kill else float("inf")
        child = os.fork()
        if child == 0:
            _become(self._module, arguments or self.arguments)
        until = time.monotonic() + after_s
        while not (status := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() >= until:
                os.kill(child, signal.SIGKILL)
                status = os.waitpid(child, 0)
                break
            time.sleep(0.002)
        return os.waitstatus_to_exitcode(status[1]), Path("log").read_text()


def _become(module: str, arguments: tuple[str, ...]) -> None:
    """Be the command, as far as a forked process can."""
    code = 99
    try:
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1) for number in (1, 2))  # noqa: SIM115
        sys.argv = ["upperson", *arguments]
        import_module(module).main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def kills_of_export(rng: np.random.Generator, trials: int) -> Iterator[str]:
    """The bundle of before is there, or the new one, whole."""
    _prepare()
    Command(TRAIN, rng)
    load_toy_graphs(Path())
    _patch.setattr("upperson_export.candidates.export_onnx", export_exchanged)
    export = Command(EXPORT, rng)
    before = snapshot(Path("bundle"))
    for _ in range(trials):
        code, log = export.run(kill=True)
        now = snapshot(Path("bundle"))
        yield from _problems(log)
        if now != before:
            try:
                Bundle.open(Path("bundle"), "fp32").check_files()
            except UppersonError as error:
                yield f"lost: {error}"
        yield f"{_ended(code)}, {'the earlier' if now == before else 'the new'} bundle"
        before = now
    yield from _problems(export.run()[1])
    yield from _leftovers(".bundle.*")


def kills_of_import(rng: np.random.Generator, trials: int) -> Iterator[str]:
    """The run is not there, or whole."""
    _prepare()
    save_official(Path("best.pth"))
    bring = Command(IMPORT, rng)
    whole = snapshot(Path("imported"))
    for _ in range(trials):
        shutil.rmtree("imported", ignore_errors=True)
        code, log = bring.run(kill=True)
        yield from _problems(log)
        there = Path("imported").exists()
        if there and snapshot(Path("imported")) != whole:
            yield "wrong: the imported run is another one"
        yield f"{_ended(code)}, {'the whole run' if there else 'nothing'}"
        if not there and bring.run()[0] != 0:
            yield "wrong: a second import does not go on"
    yield from _leftovers(".imported.*")


def kills_of_train(rng: np.random.Generator, trials: int) -> Iterator[str]:
    """A run that was killed several times ends in the same bits."""
    _prepare()
    train = Command(TRAIN, rng)
    names = ("metrics.csv", "adapter.safetensors")
    whole = {name: Path("run", name).read_bytes() for name in names}
    killed = 0
    while killed < trials:
        shutil.rmtree("run", ignore_errors=True)
        arguments = TRAIN
        for number in range(_MOST_KILLS_OF_A_RUN + 1):
            code, log = train.run(number < _MOST_KILLS_OF_A_RUN, arguments)
            yield from _problems(log)
            if code != -signal.SIGKILL:
                break
            killed += 1
            yield _ended(code)
            # Before there is a configuration nothing was begun.
            if Path("run", "config.yaml").exists():
                arguments = ("train", "--resume", "run")
        if code != 0:
            yield f"wrong: exit {code}: {log[-300:]}"
        elif {name: Path("run", name).read_bytes() for name in names} != whole:
            yield "wrong: a killed run ends in other bits"
        else:
            yield "a killed run ends in the same bits"
        yield from _leftovers("run/.*")


def kills_of_watch(rng: np.random.Generator, trials: int) -> Iterator[str]:
    """What a reader has seen is there, and no picture without a row after the next run."""
    make_toy_bundle(Path("bundle"))
    write_video(Path("street.avi"), VideoSpec(people=6, seconds=12, fps=8, seed=5))
    seconds = _watched()
    for number in range(trials):
        if number % 5 == 0:
            shutil.rmtree("gallery", ignore_errors=True)
        process = start_program("upperson-rt", *WATCH, cwd=Path.cwd(), output=Path("log"))
        seen = _read_until(process.poll, time.monotonic() + rng.uniform(0.1, 1.0) * seconds)
        process.kill()
        code = process.wait()
        yield from _problems(Path("log.err").read_text())
        if not Path("gallery", "gallery.sqlite").exists():
            yield f"{_ended(code)}, no gallery yet"
            continue
        with Gallery.open("gallery") as gallery:
            keys = {item.key for item in gallery.items()}
            problems = [line for line in gallery.verify() if "belong to no item" not in line]
        yield from (f"wrong: {problem}" for problem in problems)
        if seen - keys:
            yield f"lost: {len(seen - keys)} rows"
        yield f"{_ended(code)}, {'rows' if seen else 'no rows'} acknowledged"
    _watched()
    with Gallery.open("gallery") as gallery:
        yield from (f"leftovers: {problem}" for problem in gallery.verify())


def _watched() -> float:
    """Watch to the end; return how many seconds that took."""
    began = time.monotonic()
    done = run_program("upperson-rt", *WATCH, cwd=Path.cwd(), timeout_s=600)
    assert done.returncode == 0, done.stderr
    return time.monotonic() - began


def kills_of_shard(rng: np.random.Generator, trials: int) -> Iterator[str]:
    """A shard is finished or says that it is not, and is whole when it is run again."""
    _prepare_shards()
    arguments = ("index", "pictures", "-b", "bundle", "-g", "shards/1", "--shard", "1/2")
    shard = Command((*arguments, *_QUICK), rng, "upperson_rt.cli")
    record = Path("shards/1/shard.json")
    whole = ShardRecord.read(record)
    for number in range(trials):
        if number % 3 == 0:
            shutil.rmtree("shards/1", ignore_errors=True)
        code, log = shard.run(kill=True)
        yield from _problems(log)
        there = ShardRecord.read(record) if record.exists() else None
        finished = there is not None and there.finished
        if finished and there != whole:
            yield "wrong: another record"
        if code == 0 and not finished:
            yield "wrong: not finished, and said to be"
        yield f"{_ended(code)}, {'finished' if finished else 'not finished'}"
    yield from _problems(shard.run()[1])
    if ShardRecord.read(record) != whole:
        yield "wrong: a killed shard ends in another one"
    merge_shards(["shards/1", "shards/2"], Path("gallery"))
    yield from _merged_problems()


def kills_of_merge(rng: np.random.Generator, trials: int) -> Iterator[str]:
    """The merged gallery is not there, or whole; the shards stay as they are."""
    _prepare_shards()
    arguments = ("gallery", "merge", "shards/1", "shards/2", "-g", "gallery")
    merge = Command(arguments, rng, "upperson_rt.cli")
    before = _kept("shards")
    for _ in range(trials):
        shutil.rmtree("gallery", ignore_errors=True)
        code, log = merge.run(kill=True)
        yield from _problems(log)
        there = Path("gallery").exists()
        if there:
            yield from _merged_problems()
        if _kept("shards") != before:
            yield "wrong: a shard was changed"
        yield f"{_ended(code)}, {'the whole gallery' if there else 'nothing'}"
    shutil.rmtree("gallery", ignore_errors=True)
    yield from _problems(merge.run()[1])
    yield from _merged_problems()
    yield from _leftovers(".gallery.*")


_PICTURES = 300
_QUICK = ("--threads", "1", "--backend", "onnxruntime", "--batch-size", "16")


def _prepare_shards() -> None:
    """Make ``shards/1`` and ``shards/2`` of 300 pictures."""
    bundle, pictures = make_toy_bundle(Path("bundle")), Path("pictures")
    pictures.mkdir()
    drawn = [draw_person(pictures / f"{colour}.png", colour) for colour in COLOURS]
    for number in range(_PICTURES - len(drawn)):
        shutil.copy(drawn[number % len(drawn)], pictures / f"{number}.png")
    encoder = open_encoder(bundle, "int8", "onnxruntime", threads=1)
    for number in (1, 2):
        chosen = choose_files([pictures], Shard(number=number, of=2))
        folder = Path("shards", str(number))
        space = encoder.fingerprint, encoder.embed_dim
        with Gallery.open(folder, *space, create=True) as gallery:
            index_shard(encoder, gallery, chosen, folder / "shard.json")


def _kept(folder: str) -> dict[str, bytes]:
    """Return the files in a folder without SQLite's log, which a reader may leave, empty."""
    return {
        name: content
        for name, content in snapshot(Path(folder)).items()
        if not name.endswith("-shm") and not (name.endswith("-wal") and not content)
    }


def _merged_problems() -> Iterator[str]:
    with Gallery.open("gallery") as gallery:
        yield from (f"wrong: {problem}" for problem in gallery.verify())
        names = sorted(Path(item.key).name for item in gallery.items())
    if names != sorted(path.name for path in Path("pictures").iterdir()):
        yield "lost: pictures"


def _read_until(poll: Callable[[], int | None], until: float) -> set[str]:
    """Return the keys of a gallery as another process adds them."""
    seen: set[str] = set()
    while time.monotonic() < until and poll() is None:
        with suppress(UppersonError), Gallery.open("gallery") as gallery:
            while time.monotonic() < until and poll() is None:
                seen |= {item.key for item in gallery.items()}
                time.sleep(0.01)
        time.sleep(0.01)
    return seen


def _prepare() -> None:
    toy_config(Path(), _patch)
    know_toy_base(_patch)


def _problems(log: str) -> Iterator[str]:
    if "Traceback" in log or "internal error" in log:
        yield f"raw error: {log[-500:]}"


def _leftovers(pattern: str) -> Iterator[str]:
    if left := [str(path) for path in Path().glob(pattern)]:
        yield f"leftovers: {left}"


def _ended(code: int) -> str:
    return "killed" if code == -signal.SIGKILL else f"ended first, exit {code}"


KINDS = {
    "export": kills_of_export,
    "import": kills_of_import,
    "merge": kills_of_merge,
    "shard": kills_of_shard,
    "train": kills_of_train,
    "watch": kills_of_watch,
}
_patch = pytest.MonkeyPatch()


def try_kills(kind: str, trials: int, seed: int) -> Counter[str]:
    """Return how often each outcome came up; see `BAD`."""
    before = Path.cwd()
    torch.set_num_threads(1)  # Others would be missing in forked processes.
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            return Counter(KINDS[kind](np.random.default_rng(seed), trials))
        finally:
            os.chdir(before)
            _patch.undo()


def run_trials(kinds: Sequence[str], trials: int, seed: int) -> int:
    """Run trials, print what came of them, and return 1 if anything was lost or wrong."""
    return max([report(try_kills(kind, trials, seed), BAD, f"{kind}: ") for kind in kinds])


def main() -> int:
    options = parse(__doc__, KINDS, trials=50, seed=0)
    return run_trials(options.kinds, options.trials, options.seed)


if __name__ == "__main__":
    sys.exit(main())

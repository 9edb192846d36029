"""A bundle: the folder that holds everything needed to embed pictures and sentences."""

import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from upperson_rt.arguments import check_path, check_text
from upperson_rt.backends import Choice, installed_backends, open_backend, require_device
from upperson_rt.encoder import Encoder
from upperson_rt.errors import InputError, IntegrityError, UppersonError, UsageError
from upperson_rt.extensions import load_service
from upperson_rt.files import all_names, folder_near, refuse_archive, sha256_of_file
from upperson_rt.golden_samples import GoldenCheck, GoldenSamples, check_tower
from upperson_rt.manifest import SIGNATURE_FILE, FileEntry, Manifest, VariantEntry, parse_manifest
from upperson_rt.onnx_file import check_graph
from upperson_rt.printable import get_logger, safe_repr
from upperson_rt.score_calibration import ScoreCalibration, read_score_calibration
from upperson_rt.strict import suggestion
from upperson_rt.tokenizer import Tokenizer
from upperson_rt.towers import TOWERS, Backend, Tower, run_tower

MANIFEST_FILE = "bundle.json"
CALIBRATION = "calibration.json"
UNNAMED_FILES = frozenset({MANIFEST_FILE, CALIBRATION, "report.html", "README.md", SIGNATURE_FILE})
"""Files of a bundle that its manifest does not name."""

# What is read whole; some ten times of what exports write.
_MOST_MANIFEST_BYTES = 1 << 20
_MOST_TOKENIZER_BYTES = 8 << 20
_MOST_GOLDEN_BYTES = 32 << 20
_MOST_SCORES_BYTES = 32 << 20

_log = get_logger(__name__)


def open_encoder(
    bundle: str | os.PathLike[str],
    variant: str | None = None,
    backend: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
    trust: str | os.PathLike[str] | None = None,
) -> Encoder:
    """Open a bundle as `Bundle.open` does; return its encoder. Public as ``upperson_rt.open``."""
    return Bundle.open(bundle, variant, backend, device, threads=threads, trust=trust).encoder()


class Bundle:
    """An opened bundle in one of its variants. Safe to use from several threads.

    A tower is loaded when it is first needed, by one thread; others that need it wait. Loading
    checks its hash and then its golden samples, so that a query does not wait for the image tower.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        variant: str,
        tokenizer: Tokenizer,
        golden: GoldenSamples,
        backend: str,
        device: str,
        threads: int | None,
        verify: bool,
        calibration: ScoreCalibration | None = None,
    ) -> None:
        """Use `Bundle.open`, which checks what it passes here."""
        self.path = path
        self.manifest = manifest
        self.variant = variant
        self.tokenizer = tokenizer
        self.golden = golden
        self.calibration = calibration
        self._backend = backend
        self._device = device
        self._threads = threads
        self._verify = verify
        self._towers: dict[Tower, Backend] = {}
        self._choices: dict[Tower, Choice] = {}
        self._locks = {tower: threading.Lock() for tower in TOWERS}

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        variant: str | None = None,
        backend: str = "auto",
        device: str = "cpu",
        verify: bool = True,
        threads: int | None = None,
        trust: str | os.PathLike[str] | None = None,
    ) -> "Bundle":
        """Open a bundle.

        Args:
            path: The folder.
            variant: Which precision; by default the manifest's default.
            backend: See `open_backend`. ``auto`` takes the fastest one on a CPU, which is measured
                once for each machine and image tower (`upperson_autotune`); for a text
                tower the first one that is installed, unless it has been measured, too.
            device: See `open_backend`.
            verify: Check the hashes of tokenizer and golden samples now, and a tower's hash and
                golden samples when it is loaded. Only switch it off to look into a bundle that is
                known to be broken.
            threads: CPU threads per tower; None lets the library choose.
            trust: File with a public key (PEM). Its owner must have signed the bundle, which is
                checked before anything else in it is read; see `upperson_signature.signature`.

        Raises:
            InputError: Not a bundle, or of a newer schema.
            UsageError: The variant does not exist.
            IntegrityError: The manifest is malformed; a file is missing, has another size or hash
                than the manifest says, leaves the bundle, or holds what no export writes; or the
                bundle is not signed by the key that is trusted.
            BackendError: The device is not there, or ``trust`` needs a package that is missing.
        """
        root = Path(check_path(path, "the folder of a bundle"))
        manifest = read_manifest(root, trust)
        for what, name in {"backend": backend, "device": device}.items():
            check_text(name, what, UsageError)
        if variant is None:
            variant = manifest.default_variant
        elif check_text(variant, "variant", UsageError) not in manifest.variants:
            raise UsageError(
                f"bundle {root} has no variant {safe_repr(variant)}, "
                f"{suggestion(variant, manifest.variants)}",
                code="variant_unknown",
                variant=variant,
            )
        require_device(backend, device)
        entry = manifest.variants[variant]
        for file, most_bytes in (
            (manifest.text.tokenizer, _MOST_TOKENIZER_BYTES),
            (manifest.canaries, _MOST_GOLDEN_BYTES),
        ):
            if file.size_bytes > most_bytes:
                found = f"{safe_repr(file.size_bytes)} bytes, expected at most {most_bytes}"
                raise _damaged(root / file.file, f"has {found}", "file_too_large")
            _check_file(root, file, check_hash=verify)
        for file in map(entry.file, TOWERS):
            _check_file(root, file, check_hash=False)
        return cls(
            path=root,
            manifest=manifest,
            variant=variant,
            tokenizer=Tokenizer.from_file(
                root / manifest.text.tokenizer.file, manifest.text.context_length
            ),
            golden=GoldenSamples.from_file(root / manifest.canaries.file, manifest, variant),
            backend=backend,
            device=device,
            threads=threads,
            verify=verify,
            calibration=_read_scores(root, manifest, verify),
        )

    @property
    def entry(self) -> VariantEntry:
        """The manifest's entry of the chosen variant."""
        return self.manifest.variants[self.variant]

    def backend(self, tower: Tower) -> Backend:
        """Return the loaded tower, loading it and checking its golden samples the first time.

        Raises:
            BackendError: The backend or device is missing, or the graph does not load.
            IntegrityError: The file was changed, or a golden sample comes out wrong.
        """
        with self._locks[tower]:
            if tower not in self._towers:
                # A single query would be answered long before backends are measured for it.
                self._open(tower, measure=tower == "image", check=self._verify)
            return self._towers[tower]

    def choice(self, tower: Tower) -> Choice:
        """Return why a tower runs where it does; it is loaded as by `backend`."""
        self.backend(tower)
        return self._choices[tower]

    def check_files(self) -> None:
        """Check the files of both towers now, for programs that use them themselves.

        Raises:
            IntegrityError: A file is missing or was changed, or is no graph that exports write.
        """
        for tower in TOWERS:
            self._check_tower(tower)

    def check_golden_samples(self) -> list[GoldenCheck]:
        """Run the golden samples through both towers, at batch 1 and in batches.

        Raises:
            BackendError: As for `backend`.
            IntegrityError: A file was changed, or an embedding differs from the golden one.
        """
        checks = []
        for tower, lock in self._locks.items():
            with lock:
                if tower in self._towers:
                    checks += self._check(tower, self._towers[tower])
                else:
                    checks += self._open(tower, measure=True, check=True)
        return checks

    check_canaries = check_golden_samples
    """Earlier name."""

    @property
    def canaries(self) -> GoldenSamples:
        """Earlier name of `golden`."""
        return self.golden

    def encoder(self) -> Encoder:
        """Return the encoder of this bundle."""
        return Encoder(self.manifest, self.variant, self.tokenizer, self.backend, self.calibration)

    def _open(self, tower: Tower, *, measure: bool, check: bool) -> list[GoldenCheck]:
        """Load a tower; its lock is held."""
        entry = self.entry.file(tower)
        if self._verify:
            self._check_tower(tower)
        auto = self._backend == "auto"
        names = installed_backends(self._device) if auto else (self._backend,)
        load = partial(self._load, tower)
        taken = None
        if len(names) > 1 and check and self._device.lower() == "cpu":
            tuner = load_service("autotuner")(
                names=names,
                tower=tower,
                graph_sha256=entry.sha256,
                threads=self._threads,
                inputs=self.golden.images if tower == "image" else self.golden.input_ids,
                load=load,
                check=partial(self._check, tower),
            )
            taken = tuner.decide() if measure else tuner.known()
        if taken is None:
            loaded = load(names[0])
            checks = self._check(tower, loaded) if check else []
            which = "only" if len(names) == 1 else "first"
            why = f"auto: the {which} one installed" if auto else "as asked for"
            taken = loaded, checks, Choice(why=why)
        self._towers[tower], checks, self._choices[tower] = taken
        running, why = self._towers[tower], self._choices[tower].why
        _log.info(
            "%s tower: %s %s on %s (%s)", tower, running.name, running.version, running.device, why
        )
        return checks

    def _check_tower(self, tower: Tower) -> None:
        entry = self.entry.file(tower)
        _check_file(self.path, entry, check_hash=True)
        check_graph(self.path / entry.file, tower, self.manifest)

    def _load(self, tower: Tower, name: str) -> Backend:
        path = self.path / self.entry.file(tower).file
        return open_backend(path, name, self._device, self._threads)

    def _check(self, tower: Tower, backend: Backend) -> list[GoldenCheck]:
        running = f"{backend.name} {backend.version} on {backend.device}"
        return check_tower(
            tower,
            partial(run_tower, backend, tower),
            self.golden,
            self.entry.min_golden_cosine(backend),
            f"bundle {self.path}, variant {self.variant}, {running}",
        )


def read_manifest(root: Path, trust: str | os.PathLike[str] | None = None) -> Manifest:
    """Read and check `bundle.json`; the owner of the key ``trust`` must have signed the folder."""
    file = root / MANIFEST_FILE
    if not file.is_file():
        refuse_archive(root, "the folder of a bundle")
        problem = f"no {MANIFEST_FILE} in it" if root.is_dir() else "no such folder"
        advice = ": expected a folder that  upperson export  has made, or  upperson demo  to try"
        advice += " things out"
        if (near := folder_near(root, MANIFEST_FILE)) is not None:
            advice = f", but {near} is: name that with  --bundle"
        message = f"{root} is not a bundle ({problem}){advice}"
        raise InputError(message, code="no_bundle", path=str(root), near=near)
    if trust is not None:
        load_service("signature")(root, trust)
    try:
        with file.open("rb") as stream:
            content = stream.read(_MOST_MANIFEST_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    if len(content) > _MOST_MANIFEST_BYTES:
        raise _damaged(file, f"has more than {_MOST_MANIFEST_BYTES} bytes", "file_too_large")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(file, f"is no text in UTF-8: {error}", "no_utf8") from error
    return parse_manifest(text, where=os.fspath(file))


def unowned_in_bundle(folder: Path) -> set[str]:
    """Return the names in a folder that do not belong to its bundle; all, if it has none."""
    names = set(all_names(folder))
    try:
        manifest = read_manifest(folder)
    except UppersonError:  # Not a bundle.
        return names
    return names - UNNAMED_FILES - named_files(manifest).keys()


def require_replaceable(folder: Path, is_same: Callable[[Manifest], bool]) -> None:
    """Refuse to replace the bundle of another model, if there is one in a folder.

    Raises:
        InputError: With the code ``bundle_of_other_model``.
    """
    if not (folder / MANIFEST_FILE).exists():
        return
    found = read_manifest(folder)
    if not is_same(found):
        raise InputError(
            f"{folder} is the bundle of another model, {found.model.name} exported "
            f"{found.created}: name another output, or replace it with  --force",
            code="bundle_of_other_model",
            path=str(folder),
            name=found.model.name,
            fingerprint=found.fingerprint,
        )


def named_files(manifest: Manifest) -> dict[str, FileEntry]:
    """Return the files that a manifest names, by path."""
    entries = [manifest.text.tokenizer, manifest.canaries, manifest.report, manifest.scores]
    for variant in manifest.variants.values():
        entries += [variant.image, variant.text]
    return {entry.file: entry for entry in entries if entry is not None}


def _read_scores(root: Path, manifest: Manifest, verify: bool) -> ScoreCalibration | None:
    entry = manifest.scores
    if entry is None:
        return None
    if entry.size_bytes > _MOST_SCORES_BYTES:
        found = f"{safe_repr(entry.size_bytes)} bytes, expected at most {_MOST_SCORES_BYTES}"
        raise _damaged(root / entry.file, f"has {found}", "file_too_large")
    _check_file(root, entry, check_hash=verify)
    return read_score_calibration(root / entry.file, manifest.fingerprint)


def _damaged(path: Path, problem: str, code: str, **fields: object) -> IntegrityError:
    message = f"{path} {problem}; copy the bundle again, or export it again"
    return IntegrityError(message, code=code, path=str(path), **fields)


def _check_file(root: Path, entry: FileEntry, check_hash: bool) -> None:
    """Make sure that a file of the manifest is there, inside the bundle, and unchanged."""
    path = root / entry.file
    if not path.is_file():
        raise _damaged(path, "is missing from the bundle", "file_missing")
    if not path.resolve().is_relative_to(root.resolve()):
        message = f"{path} is a link out of the bundle, to {path.resolve()}: put the file there"
        raise IntegrityError(message, code="link_outside", path=str(path))
    size_bytes = path.stat().st_size
    if size_bytes != entry.size_bytes:
        problem = f"has {size_bytes} bytes, expected {safe_repr(entry.size_bytes)}: the file was"
        problem += " changed or not copied completely"
        sizes = {"found": size_bytes, "expected": entry.size_bytes}
        raise _damaged(path, problem, "size_differs", **sizes)
    if check_hash and (sha256 := sha256_of_file(path)) != entry.sha256:
        problem = f"has sha256 {sha256}, expected {entry.sha256}: the file was changed"
        raise _damaged(path, problem, "checksum_differs")

"""A complete bundle with toy towers: small, deterministic, and it knows a few colours.

The image tower pools colours in a grid, the text tower adds up word vectors; the word "red" points
where red pictures lie, so that retrieval can be tested for sense and not only for shape.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import tokenizers
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image, ImageDraw
from tokenizers import models, normalizers, pre_tokenizers, processors

from upperson_rt.backends import open_backend
from upperson_rt.logistic import Logistic
from upperson_rt.manifest import (
    FileEntry,
    ImageSection,
    Manifest,
    ModelSection,
    TextSection,
    VariantEntry,
    space_fingerprint,
)
from upperson_rt.score_calibration import (
    SCORES_FILE,
    Background,
    Curve,
    Reference,
    ScoreCalibration,
    write_score_calibration,
)
from upperson_rt.towers import TOWERS, run_tower

HEIGHT_PX, WIDTH_PX, EMBED_DIM, CONTEXT_LENGTH = 24, 8, 16, 12
GRID = (4, 2)
COLOURS = {
    "red": (200, 30, 40), "green": (40, 160, 60), "blue": (40, 70, 200),
    "yellow": (230, 200, 40), "white": (240, 240, 240), "black": (20, 20, 25),
}  # fmt: skip
WORDS = ["a", "an", "and", "in", "coat", "man", "woman", "with", "the", "person", "&"]
SOT, EOT = "<|startoftext|>", "<|endoftext|>"
CREATED = "2026-11-24T12:00:00+00:00"


def make_toy_tokenizer_json(context_length: int | None = None) -> str:
    """Return a word-level tokenizer framed like CLIP's; id 0 is the padding."""
    vocabulary = {
        word: index for index, word in enumerate(["!", "<unk>", *COLOURS, *WORDS, SOT, EOT])
    }
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([SOT, EOT])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SOT} $A {EOT}", special_tokens=[(SOT, vocabulary[SOT]), (EOT, vocabulary[EOT])]
    )
    if context_length is not None:
        tokenizer.enable_truncation(context_length)
    return str(tokenizer.to_str())


def make_toy_bundle(folder: Path, seed: int = 0) -> Path:
    """Write a bundle with the variants fp32 and int8 (the same towers, slightly off)."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    projection = rng.normal(size=(GRID[0] * GRID[1] * 3, EMBED_DIM)).astype(np.float32)
    (folder / "tokenizer.json").write_text(make_toy_tokenizer_json(), encoding="utf-8")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    words = rng.normal(scale=0.02, size=(tokenizer.get_vocab_size(), EMBED_DIM)).astype(np.float32)
    for colour, rgb in COLOURS.items():
        feature = np.tile(np.array(rgb, np.float32) / 255 - 0.5, GRID[0] * GRID[1])
        words[tokenizer.token_to_id(colour)] = feature @ projection

    canaries: dict[str, NDArray[np.generic]] = {
        "images": rng.integers(0, 256, (4, HEIGHT_PX, WIDTH_PX, 3), dtype=np.uint8),
        "input_ids": _canary_ids(tokenizer),
    }
    variants = {}
    for variant, noise in (("fp32", 0.0), ("int8", 0.01)):
        files = {tower: folder / f"{tower}.{variant}.onnx" for tower in TOWERS}
        scale, half = np.array(1 / 255, np.float32), np.array(0.5, np.float32)
        disturbed = _disturbed(projection, noise, rng)
        save_graph(files["image"], _image_tower(), scale=scale, half=half, projection=disturbed)
        axes = {"last": np.array([2], np.int64), "tokens_axis": np.array([1], np.int64)}
        save_graph(files["text"], _text_tower(), words=_disturbed(words, noise, rng), **axes)
        for tower, inputs in (("image", "images"), ("text", "input_ids")):
            backend = open_backend(files[tower], "onnxruntime", threads=1)
            canaries[f"{tower}_embeds.{variant}"] = run_tower(backend, tower, canaries[inputs])
        variants[variant] = VariantEntry(
            precision=variant, image=file_entry(files["image"]), text=file_entry(files["text"]),
            canary_min_cosine=0.9999, metrics={"R@1": 73.5, "mAP": 66.0},
            calibration={"images": 512} if variant == "int8" else None,
        )  # fmt: skip
    np.savez(folder / "canaries.npz", **canaries)  # type: ignore[arg-type]

    base, adapter = (hashlib.sha256(one.tobytes()).hexdigest() for one in (projection, words))
    model_section = ModelSection(
        name="toy", base="toy-base", base_sha256=base, adapter_sha256=adapter, embed_dim=EMBED_DIM
    )
    image = ImageSection(height_px=HEIGHT_PX, width_px=WIDTH_PX, resize="bilinear-antialias")
    text = TextSection(
        context_length=CONTEXT_LENGTH, tokenizer=file_entry(folder / "tokenizer.json")
    )
    manifest = Manifest(
        created=CREATED, generator="tests", model=model_section, image=image, text=text,
        variants=variants, default_variant="int8", canaries=file_entry(folder / "canaries.npz"),
        fingerprint=space_fingerprint(model_section, image, text),
    )  # fmt: skip
    (folder / "bundle.json").write_text(manifest.to_json(), encoding="utf-8")
    return folder


def calibrate_toy_bundle(bundle: Path, **changes: Any) -> ScoreCalibration:
    """Write a score calibration into a toy bundle, and name it in the manifest.

    A picture that scores 0.6 against a sentence matches with a likelihood of 0.5, one that scores
    0.85 with 0.95: pictures of the colour that a sentence names. ``changes`` are fields of it.
    """
    manifest = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    curve = Curve(slope=8.0, middle=1.15)
    fields: dict[str, Any] = {
        "fingerprint": manifest["fingerprint"], "created": CREATED, "generator": "tests",
        "version": 1, "fitted_on": {"source": "toy"}, "held_out": {}, "nobody_below": 0.05,
        "background": Background(middle=0.6, spread=1 / 12),
        "picture": _first_feature_of(12), "answer": _first_feature_of(14),
        "curves": {"sentence": curve, "picture": curve},
        "reference": Reference(mean=(0.0,) * EMBED_DIM, axes=((0.01,) * EMBED_DIM,), threshold=1.0),
    }  # fmt: skip
    calibration = ScoreCalibration(**(fields | changes))
    write_score_calibration(bundle / SCORES_FILE, calibration)
    manifest["scores"] = vars(file_entry(bundle / SCORES_FILE))
    (bundle / "bundle.json").write_text(json.dumps(manifest), encoding="utf-8")
    return calibration


def _first_feature_of(count: int) -> Logistic:
    """Log-odds that are the first feature: a scaled score, or the best picture's log-odds."""
    return Logistic(middle=(0.0,) * count, scale=(1.0,) * count, weights=(1.0,) + (0.0,) * count)


def file_entry(path: Path) -> FileEntry:
    content = path.read_bytes()
    return FileEntry(
        file=path.name, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content)
    )


def replace_in_bundle(bundle: Path, name: str, content: bytes) -> None:
    """Change a file of a bundle and bring the manifest in line: hashes pass, contents differ."""
    path = bundle / name
    path.write_bytes(content)
    manifest = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    entries = [manifest["text"]["tokenizer"], manifest["canaries"]]
    entries += [v[tower] for v in manifest["variants"].values() for tower in ("image", "text")]
    for entry in entries:
        if entry["file"] == name:
            new = file_entry(path)
            entry.update(sha256=new.sha256, size_bytes=new.size_bytes)
    text = manifest["text"] | {"tokenizer": FileEntry(**manifest["text"]["tokenizer"])}
    manifest["fingerprint"] = space_fingerprint(
        ModelSection(**manifest["model"]), ImageSection(**manifest["image"]), TextSection(**text)
    )
    (bundle / "bundle.json").write_text(json.dumps(manifest), encoding="utf-8")


def draw_person(path: Path, colour: str, size: tuple[int, int] = (64, 192), seed: int = 0) -> Path:
    """Write a picture of a person in a coat of a colour; size is width, height in pixels."""
    rng = np.random.default_rng(seed)
    width, height = size
    shade = int(rng.integers(110, 150))
    image = Image.new("RGB", size, (shade, shade, shade + 4))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, height * 0.86, width, height), fill=(shade - 30, shade - 32, shade - 36))
    middle = width / 2 + float(rng.uniform(-0.05, 0.05)) * width

    def box(x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
        return (middle + x0 * width, y0 * height, middle + x1 * width, y1 * height)

    for side in (-1, 1):
        draw.rectangle(box(min(0, 0.2 * side), 0.5, max(0, 0.2 * side), 0.92), fill=(50, 52, 62))
    draw.rounded_rectangle(box(-0.4, 0.16, 0.4, 0.66), radius=width * 0.16, fill=COLOURS[colour])
    draw.ellipse(box(-0.14, 0.03, 0.14, 0.17), fill=(214, 170, 140))
    draw.pieslice(box(-0.15, 0.02, 0.15, 0.16), 180, 360, fill=(60, 40, 30))
    image.save(path)
    return path


def _canary_ids(tokenizer: tokenizers.Tokenizer) -> NDArray[np.int32]:
    texts = ["a man in red", "a woman in a blue coat", "green", "person with the yellow coat"]
    sequences = [tokenizer.encode(text).ids for text in texts]
    ids = np.zeros((len(texts), max(map(len, sequences))), dtype=np.int32)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    return ids


def _disturbed(
    weights: NDArray[np.float32], noise: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    scale = noise * float(weights.std())
    return (weights + scale * rng.normal(size=weights.shape)).astype(np.float32)


def _image_tower() -> str:
    cell = [HEIGHT_PX // GRID[0], WIDTH_PX // GRID[1]]
    return f"""toy (uint8[N, {HEIGHT_PX}, {WIDTH_PX}, 3] image)
    => (float[N, {EMBED_DIM}] image_embeds) {{
    float_pixels = Cast<to = 1>(image)
    scaled = Mul(float_pixels, scale)
    centred = Sub(scaled, half)
    nchw = Transpose<perm = [0, 3, 1, 2]>(centred)
    pooled = AveragePool<kernel_shape = {cell}, strides = {cell}>(nchw)
    cells = Transpose<perm = [0, 2, 3, 1]>(pooled)
    flat = Flatten<axis = 1>(cells)
    raw = MatMul(flat, projection)
    norm = ReduceL2<axes = [1], keepdims = 1>(raw)
    image_embeds = Div(raw, norm)
}}"""


def _text_tower() -> str:
    return f"""toy (int32[N, L] input_ids) => (float[N, {EMBED_DIM}] text_embeds) {{
    ids = Cast<to = 7>(input_ids)
    vectors = Gather<axis = 0>(words, ids)
    present = Cast<to = 9>(input_ids)
    mask = Cast<to = 1>(present)
    mask_column = Unsqueeze(mask, last)
    kept = Mul(vectors, mask_column)
    raw = ReduceSum<keepdims = 0>(kept, tokens_axis)
    norm = ReduceL2<axes = [1], keepdims = 1>(raw)
    text_embeds = Div(raw, norm)
}}"""


def save_graph(path: Path, graph: str, **constants: Any) -> Path:
    """Write an ONNX file of opset 17: a graph in ONNX's text format, and its constants."""
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 17]> {graph}')
    for name, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path

"""``python -m benchmarks.bases`` without its models, and what it makes for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from benchmarks import bases, random_bases
from upperson.data.vocabulary import gemma_tokenizer_json
from upperson_rt.errors import BackendError
from upperson_rt.tokenizer import Tokenizer


def test_all_commands_run_over_one_base_and_the_worst_of_parity_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[list[str]] = []
    near = {"max_error": 1e-7, "min_cosine": 0.9999}
    far = {"max_error": 2e-7, "min_cosine": 0.99}
    row = {"variant": "int8", "backend": "openvino", "tower": "image"}
    compared = [
        row | {"to_reference": near}, row | {"to_reference": far}, row | {"to_reference": None},
        row | {"tower": "both", "to_reference": near},
    ]  # fmt: skip

    def command(*words: object) -> bases.Took:
        asked.append([str(word) for word in words])
        name = asked[-1][2]
        folder = tmp_path / bases.BASES[-1]
        if name == "train":
            (folder / "run").mkdir()
            (folder / "run/results.json").write_text('{"parameters": 2000000}', "utf-8")
        elif name == "export":
            (folder / "bundle").mkdir()
            times = {"onnxruntime": {t: {"ms_per_item": 7.5} for t in ("image", "text")}}
            report = {"variants": {"int8": {"size_bytes": 10**7, "latency": times}}}
            (folder / "bundle/report.json").write_text(json.dumps(report), "utf-8")
        printed = json.dumps({"comparisons": compared}) if name == "parity" else ""
        return bases.Took(seconds=2, cpu_seconds=1, peak_bytes=3 * 10**9, printed=printed)

    monkeypatch.setattr(bases, "_command", command)
    monkeypatch.setattr(bases, "call_in_fresh_process", lambda function, *_: True)
    options = ["--base", bases.BASES[-1], "--output", str(tmp_path)]
    result = CliRunner().invoke(bases.app, options)
    assert result.exit_code == 0, result.stderr
    assert [words[2] for words in asked] == list(bases.COMMANDS)
    assert asked[0][asked[0].index("--base") + 1] == str(
        tmp_path / bases.BASES[-1] / f"{bases.BASES[-1]}.json"
    )
    assert "2.0 million parameters" in result.stdout
    assert "int8 on openvino, image" in result.stdout
    assert "2.0e-07" in result.stdout
    assert "0.990000" in result.stdout


def test_a_command_that_fails_is_told_by_its_last_line() -> None:
    with pytest.raises(BackendError, match=r"ended with code 2: error: --batch must be sizes"):
        bases._command("-m", "upperson", "parity", "nowhere", "--batch", "x")


def test_a_vocabulary_has_its_size_and_knows_the_captions_words(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    captions = ["a man in a red coat", "A red hat."]
    file.write_text(json.dumps(random_bases.gemma_tokenizer(captions, 400)), "utf-8")
    tokenizer = Tokenizer.from_json(gemma_tokenizer_json(file, 400, "canonicalize"), 64)
    assert tokenizer.encode(["a red coat"]).input_ids.shape == (1, 4)  # Three words, and <eos>.


def test_every_trained_tensor_is_moved_and_names_its_base(tmp_path: Path) -> None:
    file = str(tmp_path / "adapter.safetensors")
    save_file({"up": torch.zeros(3, 2), "scale": torch.tensor(2.0)}, file, {"base": "b"})
    random_bases.move_trained(file)
    moved: dict[str, Any] = load_file(file)
    assert moved["up"].ne(0).all()
    assert moved["scale"] == pytest.approx(2.2)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"base": "b"}

"""Byte-pair vocabularies in the Hugging Face tokenizers format.

CLIP's comes with open_clip; nothing is downloaded. SigLIP 2's is Gemma's, from the file that is
published beside its weights. The result is what a bundle carries as ``tokenizer.json`` and what
training itself tokenizes with, so both sides split text alike.

Unlike the official code, which gives id 49405 to a mask token and then fails on captions with the
word "jekyll", that word keeps its id here.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from open_clip.tokenizer import SimpleTokenizer
from tokenizers import Regex
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import NFC, Lowercase, Replace
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.processors import TemplateProcessing

from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.printable import safe_repr
from upperson_rt.strict import read_json
from upperson_rt.tokenizer import CLEANED, REPAIRED, REPLACED, SPACES, WORDS, Tokenizer

PAD, EOS = "<pad>", "<eos>"

SOT = "<|startoftext|>"
EOT = "<|endoftext|>"


@cache
def clip_tokenizer_json() -> str:
    """Return the content of ``tokenizer.json``: CLIP's byte-level BPE with SOT and EOT added."""
    clip = SimpleTokenizer()
    sot_id, eot_id = clip.all_special_ids
    special = {sot_id: SOT, eot_id: EOT}
    vocabulary = {special.get(index, token): index for token, index in clip.encoder.items()}
    tokenizer = HFTokenizer(
        BPE(
            vocab=vocabulary,
            merges=list(clip.bpe_ranks),
            end_of_word_suffix="</w>",
            unk_token=EOT,
        )
    )
    tokenizer.normalizer = Normalizers(
        [
            NFC(),
            *(Replace(Regex(pattern), content) for pattern, content in REPLACED.items()),
            Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = PreTokenizers(
        [
            Split(Regex(WORDS), behavior="removed", invert=True),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = TemplateProcessing(
        single=f"{SOT} $A {EOT}", special_tokens=[(SOT, sot_id), (EOT, eot_id)]
    )
    text: str = tokenizer.to_str()
    return text


def gemma_tokenizer_json(path: Path, vocab_size: int, clean: str) -> str:
    """Return the content of ``tokenizer.json`` for a text tower with Gemma's vocabulary.

    Vocabulary and merges are the file's. What stands around them is the same for every such tower
    and is written anew: text is cleaned as open_clip does (``tokenizer_kwargs.clean``), spaces
    become U+2581, a sentence ends with ``<eos>`` and has no start token. Padding is id 0.

    Args:
        path: The published file.
        vocab_size: Rows of the tower's embedding.
        clean: ``canonicalize`` (lower case, no ASCII punctuation), ``lower`` or ``whitespace``.
    """
    if clean not in CLEANED:
        raise UsageError(
            f"tokenizer_kwargs.clean must be one of {', '.join(CLEANED)}, not {clean}",
            code="tokenizer_unsupported",
            found=clean,
        )
    content = read_json(path)
    found = content.get("model") if isinstance(content, dict) else None
    model: dict[str, Any] = found if isinstance(found, dict) else {}
    kind, vocabulary, merges = (model.get(key) for key in ("type", "vocab", "merges"))
    if kind != "BPE" or not isinstance(vocabulary, dict) or not isinstance(merges, list):
        raise InputError(
            f"{path} is no tokenizer of SigLIP 2: expected a byte-pair vocabulary (BPE), found "
            f"{safe_repr(kind)}; SigLIP without the 2 has another kind, which is not supported",
            code="tokenizer_unsupported",
            path=path,
            found=kind,
        )
    if len(vocabulary) != vocab_size:
        raise InputError(
            f"{path} has {len(vocabulary)} tokens, but the text tower has {vocab_size}: take the "
            "tokenizer.json that is published with this base",
            code="tokenizer_size",
            path=path,
            expected=vocab_size,
            found=len(vocabulary),
        )
    expected = {PAD: 0, EOS: 1}
    if any(vocabulary.get(token) != index for token, index in expected.items()):
        raise InputError(
            f"{path} is no tokenizer of SigLIP 2: <pad> must have id 0 and <eos> 1",
            code="tokenizer_unsupported",
            path=path,
        )
    written: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": [*REPAIRED, *CLEANED[clean], SPACES]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": EOS, "type_id": 0}},
            ],
            "pair": [],
            "special_tokens": {EOS: {"id": EOS, "ids": [1], "tokens": [EOS]}},
        },
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.get("unk_token"),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    text = json.dumps(written, ensure_ascii=False, separators=(",", ":"))
    try:
        Tokenizer.from_json(text, 64)  # As the runtime will.
    except (InputError, IntegrityError) as error:
        raise InputError(
            f"{path} is no tokenizer of SigLIP 2: {error}", code="tokenizer_unsupported", path=path
        ) from error
    return text


def clip_tokenizer(context_length: int = 77) -> Tokenizer:
    """Return the runtime's tokenizer over CLIP's vocabulary."""
    return Tokenizer.from_json(clip_tokenizer_json(), context_length=context_length)

"""CLIP's byte-pair vocabulary in the Hugging Face tokenizers format.

The vocabulary comes with open_clip; nothing is downloaded. The result is what a bundle carries as
``tokenizer.json`` and what training itself tokenizes with, so both sides split text alike.

Unlike the official code, which gives id 49405 to a mask token and then fails on captions with the
word "jekyll", that word keeps its id here.
"""

from functools import cache

from open_clip.tokenizer import SimpleTokenizer
from tokenizers import Regex
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import NFC, Lowercase, Replace
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.processors import TemplateProcessing

from upperson_rt.tokenizer import Tokenizer
from upperson_rt.tokenizer_file import REPLACED, WORDS

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


def clip_tokenizer(context_length: int = 77) -> Tokenizer:
    """Return the runtime's tokenizer over CLIP's vocabulary."""
    return Tokenizer.from_json(clip_tokenizer_json(), context_length=context_length)

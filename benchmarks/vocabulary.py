"""A vocabulary for made-up models, the same for moray and llama.cpp, so that servers can be sent text.

Every lower-case letter and the space is a token, and no two are ever merged: a text of n of these characters has n
tokens. All other tokens are words with their id, such as `` w17``, which no text becomes. Characters are spread over
the ids at equal distances, and the words between them are what a planted model generates, which walks from id to id.
The last token ends a text; nothing generates it.
"""

from __future__ import annotations

import json
import string
from pathlib import Path

from gguf_file import Value

CHARACTERS = string.ascii_lowercase + " "
_SPACE = "\u0120"  # in the byte-level BPE of GPT-2, which both sides know
_NORMAL, _CONTROL = 1, 3  # types of tokens in GGUF


def pieces_of(vocab: int) -> list[str]:
    """Text of each token id, in GPT-2's alphabet for bytes."""
    pieces = [f"{_SPACE}w{index}" for index in range(vocab)]
    for index, character in enumerate(CHARACTERS):
        pieces[index * longest_walk(vocab)] = character if character != " " else _SPACE
    pieces[-1] = "<end>"
    return pieces


def longest_walk(vocab: int) -> int:
    """Tokens from one character to the next: a generation that starts at one must be shorter."""
    return (vocab - 1) // len(CHARACTERS)


def write_tokenizer(store: Path, vocab: int) -> None:
    """The files of a checkpoint's tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces_of(vocab))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(store / "tokenizer.json"))
    (store / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def gguf_vocabulary(vocab: int) -> dict[str, Value]:
    """Metadata of a GGUF file."""
    types = [_NORMAL] * (vocab - 1) + [_CONTROL]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": pieces_of(vocab),
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["w 1"],  # llama.cpp wants one; nothing that is sent has it
        "tokenizer.ggml.bos_token_id": vocab - 1,
        "tokenizer.ggml.eos_token_id": vocab - 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }

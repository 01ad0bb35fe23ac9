"""What a vocabulary's tokens write, one by one: bytes, for a token may end in the middle of a character."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a reader of log-probabilities needs to know of token ids."""

    pieces: tuple[bytes, ...]  # what each token writes, by id
    end_ids: frozenset[int]  # tokens that end a text and are no part of it


def token_bytes(tokenizer: Any, vocabulary_size: int) -> tuple[bytes, ...]:
    """The bytes of each token id below ``vocabulary_size``; ids that the tokenizer does not know write nothing.

    Two conventions are in use: GPT-2's, a printable character for each byte, and SentencePiece's, "▁" for a space and
    "<0xE2>" for a byte. Which one is in the tokenizer's decoder. Added tokens are written as they are.
    """
    size = min(vocabulary_size, len(tokenizer))
    pieces = tokenizer.convert_ids_to_tokens(list(range(size)))
    added = {int(token_id): str(token) for token_id, token in tokenizer.added_tokens_decoder.items()}
    byte_of = _byte_of_character() if _is_byte_level(tokenizer) else None
    written = [
        added[i].encode() if i in added else b"" if piece is None else _written(piece, byte_of)
        for i, piece in enumerate(pieces)
    ]
    return tuple(written) + (b"",) * (vocabulary_size - size)


def _written(piece: str, byte_of: dict[str, int] | None) -> bytes:
    if byte_of is not None and all(character in byte_of for character in piece):
        return bytes(byte_of[character] for character in piece)
    if match := _BYTE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    return piece.replace("▁", " ").encode()


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and '"ByteLevel"' in json.dumps(json.loads(backend.to_str()).get("decoder"))


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet (encoder.py, bytes_to_unicode): printable bytes stand for themselves, others for 256 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}

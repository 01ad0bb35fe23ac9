"""From what people write to token ids, with the checkpoint's own tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig

from moray.runtime.errors import EvaluationError, RequestError, StoreError
from moray.runtime.generation.request import Message, Prompt

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_tokenizer(path: Path) -> Any | None:
    """The store's tokenizer; None if it has none. Raises StoreError if it cannot be read."""
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(f"the tokenizer in {path} cannot be loaded ({error}); copy its files again") from error


def require_tokenizer(path: Path) -> Any:
    """The store's tokenizer. Raises StoreError if it has none, or it cannot be read."""
    tokenizer = load_tokenizer(path)
    if tokenizer is None:
        raise StoreError(f"{path} has no tokenizer, which a text needs; copy the checkpoint's tokenizer files into it")
    return tokenizer


def encode_file(tokenizer: Any, file: Path) -> tuple[int, ...]:
    """Token ids of a text to evaluate on, at least 2. Raises EvaluationError."""
    ids = encode_prompt(tokenizer, _read_text(file))
    if len(ids) < 2:
        raise EvaluationError(
            f"the text {file} has {len(ids)} token(s), expected at least 2: the first is context only; "
            "give a longer text"
        )
    return ids


def _read_text(file: Path) -> str:
    """Line ends stay as they are."""
    try:
        text = file.read_bytes().decode("utf-8")
    except OSError as error:
        raise EvaluationError(
            f"the text {file} cannot be read ({error.strerror}); expected a file of UTF-8 text"
        ) from error
    except UnicodeDecodeError as error:
        raise EvaluationError(
            f"the text {file} is not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}); "
            "convert it first, for example with iconv"
        ) from error
    if not text:
        raise EvaluationError(f"the text {file} is empty; expected a file of UTF-8 text")
    return text


def encode_prompt(tokenizer: Any | None, prompt: Prompt) -> tuple[int, ...]:
    """Token ids of a text, a chat or ready ids. Raises RequestError."""
    if not isinstance(prompt, str) and all(isinstance(item, int) for item in prompt):
        return tuple(prompt)  # type: ignore[arg-type]
    if tokenizer is None:
        raise RequestError("this store has no tokenizer; give the prompt as token ids")
    if isinstance(prompt, str):
        return tuple(tokenizer(prompt, verbose=False)["input_ids"])  # too long: the step loop says so better
    if not all(isinstance(item, Message) for item in prompt):
        raise RequestError("a prompt is a text, a list of token ids or a list of messages")
    return _encode_chat(tokenizer, list(prompt))  # type: ignore[arg-type]


def _encode_chat(tokenizer: Any, messages: list[Message]) -> tuple[int, ...]:
    if not tokenizer.chat_template:
        return _encode_plain(tokenizer, messages)
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # templates raise what they like, jinja2's own errors included
        raise RequestError(f"the checkpoint's chat template refuses these messages: {error}") from error
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _encode_plain(tokenizer: Any, messages: list[Message]) -> tuple[int, ...]:
    """The chat of a base model: one text, each line of the user's ended by a newline.

    Turn by turn, so that what comes later never changes how the beginning is cut into tokens.
    """
    ids: list[int] = []
    for message in messages:
        text = message.content + ("\n" if message.role == "user" else "")
        ids += message.token_ids or tokenizer(text, add_special_tokens=not ids)["input_ids"]
    return tuple(ids)


def end_token_ids(path: Path, config: PretrainedConfig) -> frozenset[int]:
    """Tokens that end a text, from generation_config.json or else config.json."""
    source: Any = config.get_text_config()
    if (path / "generation_config.json").is_file():
        source = GenerationConfig.from_pretrained(path, local_files_only=True)
    ids = getattr(source, "eos_token_id", None)
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, (list, tuple)) else [ids])

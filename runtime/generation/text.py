"""From what people write to token ids, with the checkpoint's own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig

from moray.runtime.errors import RequestError, StoreError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat. Roles are the chat template's: usually system, user, assistant."""

    role: str
    content: str


Prompt = str | Sequence[int] | Sequence[Message]


def load_tokenizer(path: Path) -> Any | None:
    """The store's tokenizer; None if it has none. Raises StoreError if it cannot be read."""
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(f"the tokenizer in {path} cannot be loaded ({error}); copy its files again") from error


def encode_prompt(tokenizer: Any | None, prompt: Prompt) -> tuple[int, ...]:
    """Token ids of a text, a chat or ready ids. Raises RequestError."""
    if not isinstance(prompt, str) and all(isinstance(item, int) for item in prompt):
        return tuple(prompt)  # type: ignore[arg-type]
    if tokenizer is None:
        raise RequestError("this store has no tokenizer; give the prompt as token ids")
    if isinstance(prompt, str):
        return tuple(tokenizer(prompt)["input_ids"])
    if not all(isinstance(item, Message) for item in prompt):
        raise RequestError("a prompt is a text, a list of token ids or a list of messages")
    return _encode_chat(tokenizer, list(prompt))  # type: ignore[arg-type]


def _encode_chat(tokenizer: Any, messages: list[Message]) -> tuple[int, ...]:
    if not tokenizer.chat_template:
        # A base model: its chat is the text so far, one turn a line.
        return tuple(tokenizer("\n".join(message.content for message in messages))["input_ids"])
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # templates raise what they like, jinja2's own errors included
        raise RequestError(f"the checkpoint's chat template refuses these messages: {error}") from error
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def end_token_ids(path: Path, config: PretrainedConfig) -> frozenset[int]:
    """Tokens that end a text, from generation_config.json or else config.json."""
    source: Any = config.get_text_config()
    if (path / "generation_config.json").is_file():
        source = GenerationConfig.from_pretrained(path, local_files_only=True)
    ids = getattr(source, "eos_token_id", None)
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, (list, tuple)) else [ids])

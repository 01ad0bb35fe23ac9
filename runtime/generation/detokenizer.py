"""Text from tokens as they come: never half a character, and never text past a stop string."""

from __future__ import annotations

from typing import Protocol

REPLACEMENT = "\ufffd"


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> str: ...


class Detokenizer:
    """Turns one sequence's new tokens into text.

    A token may end in the middle of a character (byte-level vocabularies) and may change how its neighbours are
    written (leading spaces), so each step decodes a short window twice: without and with the new tokens.
    """

    def __init__(self, tokenizer: Tokenizer | None, prompt_ids: tuple[int, ...], stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._ids = _context(tokenizer, list(prompt_ids))
        self._shown = len(self._ids)  # tokens before this are already in the text
        self._window = 0  # decoding starts here
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is now certain, "" if none. Sets ``stopped`` at a stop string."""
        self._ids.append(token_id)
        return self._release(self._new_text(final=False), final=False)

    def finish(self) -> str:
        """The rest, once no token follows: incomplete characters become U+FFFD."""
        return "" if self.stopped else self._release(self._new_text(final=True), final=True)

    def _new_text(self, final: bool) -> str:
        if self._tokenizer is None:
            return ""
        before = self._tokenizer.decode(self._ids[self._window : self._shown], skip_special_tokens=True)
        after = self._tokenizer.decode(self._ids[self._window :], skip_special_tokens=True)
        if len(after) <= len(before) or (after.endswith(REPLACEMENT) and not final):
            return ""
        self._window, self._shown = self._shown, len(self._ids)
        return after[len(before) :]

    def _release(self, text: str, final: bool) -> str:
        text = self._held + text
        ends = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _context(tokenizer: Tokenizer | None, prompt: list[int]) -> list[int]:
    """The prompt's last tokens: enough for leading-space rules, and not cut inside a character.

    With single bytes as tokens, half a character in front would spoil the whole characters that follow it.
    """
    first = max(0, len(prompt) - 8)
    candidates = [prompt[at:] for at in range(first, max(0, first - 3) - 1, -1)]  # a character has at most 4 bytes
    if tokenizer is None:
        return candidates[0]
    return min(candidates, key=lambda ids: tokenizer.decode(ids, skip_special_tokens=True).count(REPLACEMENT))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0

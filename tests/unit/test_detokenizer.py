from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from moray.deploy.config import demo_store
from moray.runtime.generation.detokenizer import REPLACEMENT, Detokenizer
from moray.runtime.generation.text import load_tokenizer

BYTE_LEVEL: Any = load_tokenizer(demo_store())


def make_byte_fallback() -> PreTrainedTokenizerFast:
    """Like Llama's and Mixtral's: pieces with a mark for spaces, and single bytes for all other characters."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghij", "▁a", "▁b", "ab", "▁ab"]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    inner = Tokenizer(model)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")


BYTE_FALLBACK: Any = make_byte_fallback()


def encode(tokenizer: Any, text: str) -> list[int]:
    if tokenizer is BYTE_LEVEL:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    vocabulary = tokenizer.get_vocab()
    ids: list[int] = []
    for character in text.replace(" ", "▁"):
        bytes_of = [vocabulary[f"<0x{byte:02X}>"] for byte in character.encode()]
        ids += [vocabulary[character]] if character in vocabulary else bytes_of
    return ids


def run(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    """Every piece of text as it comes; the last is what was held back to the end."""
    pieces = []
    for token in ids:
        pieces.append(detokenizer.push(token))
        if detokenizer.stopped:
            return pieces
    return [*pieces, detokenizer.finish()]


characters = st.sampled_from("ab  \n.é世界語🙂👩‍👩‍👧🇨🇭한ا\u0301\ufffd") | st.characters(codec="utf-8")
texts = st.lists(characters, max_size=30).map("".join)
tokenizers = st.sampled_from([BYTE_LEVEL, BYTE_FALLBACK])


@settings(max_examples=300, deadline=None)
@given(tokenizers, texts, texts)
@example(BYTE_FALLBACK, "世世世", "界")  # the prompt's last tokens are bytes of characters
@example(BYTE_FALLBACK, "🙂x" * 3 + "世世世", "🙂🙂")
@example(BYTE_FALLBACK, "\ufffd00🙂", "世")
def test_pieces_are_whole_characters_and_add_up(tokenizer: Any, prompt: str, text: str) -> None:
    prompt_ids, ids = [tokenizer.bos_token_id, *encode(tokenizer, prompt)], encode(tokenizer, text)
    pieces = run(Detokenizer(tokenizer, tuple(prompt_ids), ()), ids)
    before, whole = (tokenizer.decode(i, skip_special_tokens=True) for i in (prompt_ids, prompt_ids + ids))
    assert "".join(pieces) == whole[len(before) :]
    if REPLACEMENT not in text:
        assert REPLACEMENT not in "".join(pieces)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 4095), max_size=30))
def test_any_tokens_add_up_to_their_text(ids: list[int]) -> None:
    pieces = run(Detokenizer(BYTE_LEVEL, (0,), ()), ids)
    assert "".join(pieces) == BYTE_LEVEL.decode(ids, skip_special_tokens=True)


def test_text_comes_as_soon_as_it_is_whole() -> None:
    ids = encode(BYTE_LEVEL, "a🙂b")
    assert len(ids) == 6
    assert run(Detokenizer(BYTE_LEVEL, (0,), ()), ids) == ["a", "", "", "", "🙂", "b", ""]


def test_half_a_character_is_shown_at_the_end_only() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, (0,), ())
    assert [detokenizer.push(token) for token in encode(BYTE_LEVEL, "a🙂")[:-1]] == ["a", "", "", ""]
    assert detokenizer.finish() == REPLACEMENT
    assert not detokenizer.stopped


def test_a_character_that_breaks_off_is_shown_with_what_follows() -> None:
    ids = encode(BYTE_LEVEL, "🙂")[:2] + encode(BYTE_LEVEL, "ab")
    pieces = run(Detokenizer(BYTE_LEVEL, (0,), ()), ids)
    assert pieces[:2] == ["", ""] and "".join(pieces) == REPLACEMENT + "ab"


def test_special_tokens_have_no_text() -> None:
    ids = [*encode(BYTE_LEVEL, "a"), 0, *encode(BYTE_LEVEL, " b"), 0]
    assert run(Detokenizer(BYTE_LEVEL, (0,), ()), ids) == ["a", "", " b", "", ""]


def test_spaces_between_pieces_are_kept() -> None:
    vocabulary = BYTE_FALLBACK.get_vocab()
    ids = [vocabulary[piece] for piece in ("▁ab", "▁a", "b", "▁", "▁b")]
    assert run(Detokenizer(BYTE_FALLBACK, (1,), ()), ids) == ["ab", " a", "b", " ", " b", ""]
    after_text = Detokenizer(BYTE_FALLBACK, (1, vocabulary["a"]), ())
    assert run(after_text, ids) == [" ab", " a", "b", " ", " b", ""]


def test_without_a_tokenizer_there_is_no_text() -> None:
    assert run(Detokenizer(None, (1, 2), ()), [3, 4]) == ["", "", ""]


# ------------------------------------------------------------------------------------ stop strings


@settings(max_examples=300, deadline=None)
@given(
    tokenizers,
    st.text("ab🙂世 ", max_size=20),
    st.lists(st.text("ab🙂世 ", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_ends_before_the_first_stop_string(tokenizer: Any, text: str, stop: list[str]) -> None:
    prompt, ids = (tokenizer.bos_token_id, *encode(tokenizer, "b")), encode(tokenizer, text)
    detokenizer = Detokenizer(tokenizer, prompt, tuple(stop))
    pieces = run(detokenizer, ids)
    for count in range(1, len(ids) + 1):
        known = tokenizer.decode([*prompt, *ids[:count]], skip_special_tokens=True)[1:]
        found = [known.find(string) for string in stop if string in known]
        if found:  # at the first token that completes one
            assert len(pieces) == count and detokenizer.stopped
            assert "".join(pieces) == known[: min(found)]
            return
    assert "".join(pieces) == text and not detokenizer.stopped


def test_text_that_may_begin_a_stop_string_is_held_back_until_it_is_decided() -> None:
    ids = [token for character in "xENxENDy" for token in encode(BYTE_LEVEL, character)]
    detokenizer = Detokenizer(BYTE_LEVEL, (0,), ("END", "Nz"))
    assert run(detokenizer, ids) == ["x", "", "", "ENx", "", "", ""]
    assert detokenizer.stopped and detokenizer.finish() == ""


def test_text_held_back_is_released_at_the_end() -> None:
    ids = [token for character in "abEN" for token in encode(BYTE_LEVEL, character)]
    detokenizer = Detokenizer(BYTE_LEVEL, (0,), ("END",))
    assert run(detokenizer, ids) == ["a", "b", "", "", "EN"]
    assert not detokenizer.stopped


def test_a_stop_string_that_overlaps_itself_is_found() -> None:
    ids = [token for character in "aaab" for token in encode(BYTE_LEVEL, character)]
    assert run(Detokenizer(BYTE_LEVEL, (0,), ("aab",)), ids) == ["", "", "a", ""]


@pytest.mark.parametrize("stop", ["ab", "b", "b "])
def test_a_stop_string_in_the_prompt_does_not_stop(stop: str) -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, tuple(encode(BYTE_LEVEL, "cab")), (stop,))
    assert "".join(run(detokenizer, encode(BYTE_LEVEL, " c"))) == " c"

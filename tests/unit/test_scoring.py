"""Scores of a model: from logits, and through the step loop's thread."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from moray.runtime.errors import MorayError, RequestError
from moray.runtime.generation import scoring
from moray.runtime.generation.runner import Runner
from moray.runtime.generation.scoring import score_logits

IDS = [0, 5, 17, 99, 4000, 7, 7, 250]


def logits_and_ids(vocabulary: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, np.ndarray]:
    logits = 4 * torch.randn(23, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    return logits.to(dtype), np.random.default_rng(0).integers(0, vocabulary, 23).astype(np.int32)


@pytest.mark.parametrize("vocabulary", [3, 64, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_log_softmax(vocabulary: int, dtype: torch.dtype) -> None:
    logits, ids = logits_and_ids(vocabulary, dtype)
    scores = score_logits(logits, ids)
    expected = torch.log_softmax(logits.double(), -1)
    num_top = min(64, vocabulary)
    assert scores.top_ids.shape == scores.top_log_probs.shape == (23, num_top)
    assert scores.next_log_probs.dtype == scores.top_log_probs.dtype == scores.top_rest.dtype == np.float32
    np.testing.assert_allclose(scores.next_log_probs, expected[range(23), ids.astype(np.int64)], atol=1e-5)
    np.testing.assert_allclose(scores.top_log_probs, expected.topk(num_top).values, atol=1e-5)
    np.testing.assert_array_equal(scores.top_ids[:, 0], logits.float().argmax(-1))
    at_top = np.take_along_axis(expected.numpy(), scores.top_ids.astype(np.int64), -1)
    np.testing.assert_allclose(scores.top_log_probs, at_top, atol=1e-5)
    np.testing.assert_allclose(np.exp(scores.top_log_probs).sum(-1) + np.exp(scores.top_rest), 1, atol=1e-5)
    assert scores.candidate_log_probs is scores.candidate_rest is None


def test_candidates_are_looked_up_in_their_row_and_order() -> None:
    logits, ids = logits_and_ids(500)
    candidates = np.random.default_rng(1).permuted(np.tile(np.arange(500, dtype=np.int32), (23, 1)), axis=1)[:, :9]
    scores = score_logits(logits, ids, candidates)
    expected = torch.log_softmax(logits.double(), -1).numpy()
    kept = np.take_along_axis(expected, candidates.astype(np.int64), -1)
    np.testing.assert_allclose(scores.candidate_log_probs, kept, atol=1e-5)
    np.testing.assert_allclose(scores.candidate_rest, np.log1p(-np.exp(kept).sum(-1)), atol=1e-5)


@pytest.mark.parametrize("rows", [1, 5, 23])
def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    logits, ids = logits_and_ids(500)
    whole = score_logits(logits, ids)
    whole = score_logits(logits, ids, whole.top_ids)
    monkeypatch.setattr(scoring, "_SLICE_ELEMENTS", rows * 500)
    sliced = score_logits(logits, ids, whole.top_ids)
    for name in whole.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(sliced, name), getattr(whole, name))


def test_a_slice_has_at_least_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_SLICE_ELEMENTS", 10)
    assert len(score_logits(*logits_and_ids(500)).next_log_probs) == 23


# ----------------------------------------------------------------------------------------- runner


@pytest.fixture(scope="module")
def log_probs(demo_runner: Runner) -> Iterator[torch.Tensor]:
    """[T-1, V] of IDS."""
    yield torch.log_softmax(demo_runner.logits(IDS)[:-1], -1)


def test_a_runner_scores_the_token_that_follows_each(demo_runner: Runner, log_probs: torch.Tensor) -> None:
    scores = demo_runner.score(IDS)
    np.testing.assert_array_equal(scores.next_log_probs, log_probs[range(7), IDS[1:]])
    np.testing.assert_array_equal(scores.top_ids[:, 0], log_probs.argmax(-1))
    np.testing.assert_array_equal(scores.top_log_probs, log_probs.topk(64).values)


def test_a_runner_looks_candidates_up(demo_runner: Runner, log_probs: torch.Tensor) -> None:
    candidates = np.arange(14, dtype=np.int32).reshape(7, 2) * 100
    scores = demo_runner.score(IDS, candidates)
    np.testing.assert_array_equal(scores.candidate_log_probs, log_probs.gather(-1, torch.from_numpy(candidates).long()))


def test_a_full_context_is_scored(demo_runner: Runner) -> None:
    assert len(demo_runner.score([0, 5] * 1024).next_log_probs) == 2047


@pytest.mark.parametrize(
    ("ids", "candidates", "message"),
    [
        ([], None, "the prompt is empty"),
        ([1], None, "expected at least 2"),
        ([1, 4096], None, "token id 4096"),
        ([-1, 1], None, "token id -1"),
        ([5] * 2049, None, "2048 tokens"),
        ([1, 2, 3], np.zeros((3, 4), np.int32), r"shape \[3, 4\], expected \[2, K\]"),
        ([1, 2, 3], np.zeros(2, np.int32), r"shape \[2\], expected \[2, K\]"),
        ([1, 2], np.array([[4096]], np.int32), "token id 4096"),
        ([1, 2], np.array([[-1]], np.int32), "token id -1"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    demo_runner: Runner, ids: list[int], candidates: np.ndarray | None, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        demo_runner.score(ids, candidates)


def test_errors_on_the_loops_thread_are_raised_here(demo_runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise MorayError("no luck")

    monkeypatch.setattr("moray.runtime.generation.step_loop.score_logits", fail)
    with pytest.raises(MorayError, match="no luck"):
        demo_runner.score(IDS)

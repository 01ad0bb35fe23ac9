"""The arithmetic of evaluations, against torch in float64."""

from __future__ import annotations

import json
import math
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from moray.deploy.evaluation_report import Report, StoreResult, Text, print_report, short_names
from moray.runtime.arrays import Floats
from moray.runtime.errors import EvaluationError
from moray.runtime.evaluation import Evaluation, TokenScores, cut_windows, kl_divergences
from moray.runtime.generation.scoring import score_logits
from moray.runtime.store.store import Store


def random_logits(seed: int, length: int, vocabulary: int, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(length, vocabulary, generator=torch.Generator().manual_seed(seed))


def random_ids(seed: int, length: int, vocabulary: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, length).astype(np.int32)


def pair(length: int, vocabulary: int, noise: float) -> tuple[torch.Tensor, torch.Tensor, TokenScores, TokenScores]:
    """Logits of a reference and of a store near it, and their scores."""
    reference = random_logits(1, length, vocabulary)
    store = reference + noise * random_logits(2, length, vocabulary, 1.0)
    ids = random_ids(3, length, vocabulary)
    expected = score_logits(reference, ids)
    return reference, store, expected, score_logits(store, ids, expected.top_ids)


def scores_of(next_log_probs: Floats) -> TokenScores:
    """Scores of which only the next tokens matter."""
    rows = len(next_log_probs)
    none = np.zeros((rows, 1), np.float32)
    return TokenScores(next_log_probs, np.zeros((rows, 1), np.int32), none, none[:, 0])


# ---------------------------------------------------------------------------------------- windows


@given(st.integers(0, 60), st.integers(2, 20))
def test_windows_hold_every_token_but_a_single_last_one(length: int, window: int) -> None:
    ids = list(range(length))
    windows = list(cut_windows(ids, window))
    left_out = length % window == 1
    assert [i for w in windows for i in w] == (ids[:-1] if left_out else ids)
    assert all(len(w) == window for w in windows[:-1])
    assert all(2 <= len(w) <= window for w in windows)


# ------------------------------------------------------------------------------------- perplexity


@pytest.mark.parametrize("vocabulary", [5, 64, 1000])
def test_perplexity_is_exp_of_torchs_cross_entropy_over_all_windows(vocabulary: int) -> None:
    evaluation, losses = Evaluation(), []
    for seed, length in enumerate((7, 1, 30)):  # means of windows of different lengths must not be averaged
        logits, ids = random_logits(seed, length, vocabulary), random_ids(seed, length, vocabulary)
        evaluation.add(score_logits(logits, ids))
        losses.append(cross_entropy(logits.double(), torch.from_numpy(ids).long(), reduction="none"))
    expected = torch.cat(losses)
    assert evaluation.num_predicted == len(expected) == 38
    assert evaluation.mean_nll == pytest.approx(float(expected.mean()), rel=1e-6)
    assert evaluation.perplexity == pytest.approx(float(expected.mean().exp()), rel=1e-5)
    assert evaluation.nll_standard_error == pytest.approx(float(expected.std() / math.sqrt(38)), rel=1e-5)


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity_and_no_spread() -> None:
    evaluation = Evaluation()
    evaluation.add(score_logits(torch.zeros(9, 300), random_ids(0, 9, 300)))
    assert evaluation.perplexity == pytest.approx(300, rel=1e-6)
    assert evaluation.nll_standard_error == pytest.approx(0, abs=1e-6)


def test_one_token_has_no_standard_error_and_no_reference_no_agreement() -> None:
    evaluation = Evaluation()
    evaluation.add(scores_of(np.array([-2], np.float32)))
    assert evaluation.mean_nll == 2
    assert evaluation.nll_standard_error is evaluation.same_top_share is evaluation.mean_kl is None


@pytest.mark.parametrize("value", [-np.inf, np.nan])
def test_a_log_probability_that_is_not_finite_is_refused_by_its_token(value: float) -> None:
    with pytest.raises(EvaluationError, match=f"token 2 of a window is {value}"):
        Evaluation().add(scores_of(np.array([-1, value, -1], np.float32)))


def test_a_perplexity_beyond_floats_is_infinite() -> None:
    evaluation = Evaluation()
    evaluation.add(scores_of(np.array([-1000], np.float32)))
    assert evaluation.perplexity == math.inf


# -------------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize("vocabulary", [7, 64])
@pytest.mark.parametrize("noise", [0.01, 1.0])
def test_kl_of_a_vocabulary_that_fits_is_torchs(vocabulary: int, noise: float) -> None:
    reference, store, expected, scores = pair(40, vocabulary, noise)
    p, q = log_softmax(reference.double(), -1), log_softmax(store.double(), -1)
    whole = kl_div(q, p, reduction="none", log_target=True).sum(-1)
    np.testing.assert_allclose(kl_divergences(expected, scores), whole.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("vocabulary", [65, 1000])
@pytest.mark.parametrize("noise", [0.01, 1.0])
def test_kl_of_a_larger_one_is_torchs_with_the_rest_in_one_bucket(vocabulary: int, noise: float) -> None:
    reference, store, expected, scores = pair(40, vocabulary, noise)
    top = torch.from_numpy(expected.top_ids).long()
    p, q = (_bucketed(log_softmax(logits.double(), -1), top) for logits in (reference, store))
    bucketed = kl_div(q, p, reduction="none", log_target=True).sum(-1).numpy()
    found = kl_divergences(expected, scores)
    np.testing.assert_allclose(found, bucketed, rtol=1e-4, atol=1e-6)
    evaluation = Evaluation()
    evaluation.add(scores, expected)
    assert evaluation.mean_kl == pytest.approx(bucketed.mean(), rel=1e-4, abs=1e-6)


def _bucketed(log_probs: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """[T, K + 1] log-probabilities of the top tokens and of the rest, by plain sums of probabilities."""
    kept = log_probs.gather(-1, top)
    is_rest = torch.ones_like(log_probs, dtype=torch.bool).scatter(-1, top, False)
    rest = torch.where(is_rest, log_probs.exp(), 0).sum(-1, keepdim=True).log()
    return torch.cat((kept, rest), dim=-1)


@pytest.mark.parametrize("vocabulary", [7, 64, 65, 1000])
def test_a_store_agrees_with_itself_exactly(vocabulary: int) -> None:
    _, _, expected, scores = pair(40, vocabulary, 0.0)
    evaluation = Evaluation()
    evaluation.add(scores, expected)
    assert (evaluation.same_top_share, evaluation.mean_kl) == (1.0, 0.0)


def test_kl_is_of_the_reference_and_not_of_the_store() -> None:
    half, certain = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(9)]])
    ids = np.zeros(1, np.int32)
    expected = score_logits(half, ids)
    (found,) = kl_divergences(expected, score_logits(certain, ids, expected.top_ids))
    assert found == pytest.approx(0.5 * math.log(0.5 / 0.1) + 0.5 * math.log(0.5 / 0.9), rel=1e-6)


def test_the_share_of_same_top_tokens_counts_positions_of_all_windows() -> None:
    evaluation, same, total = Evaluation(), 0, 0
    for length in (10, 33):
        reference, store, expected, scores = pair(length, 200, 1.5)
        evaluation.add(scores, expected)
        same += int((reference.argmax(-1) == store.argmax(-1)).sum())
        total += length
    assert 0 < same < total
    assert evaluation.same_top_share == same / total


# ----------------------------------------------------------------------------------------- report


def report_of(demo: Store, *nll: float, agrees: bool = False) -> Report:
    results = []
    for index, value in enumerate(nll):
        evaluation = Evaluation()
        evaluation.add(scores_of(np.array([-value, -value], np.float32)))
        if agrees:
            _, _, expected, scores = pair(8, 100, 0.0)
            evaluation.add(scores, expected)
        results.append(
            StoreResult(f"s{index}", demo.path, demo.manifest, demo.fingerprint, "int8", evaluation, 1000 / 3)
        )
    return Report(512, None, [Text(Path("a.txt"), 9, 3)], 1, results[0] if agrees else None, results)


def printed(report: Report, width: int = 80, terminal: bool = False, as_json: bool = False) -> str:
    out = StringIO()
    print_report(report, Console(file=out, width=width, force_terminal=terminal, color_system=None), as_json=as_json)
    return out.getvalue()


def test_the_table_has_a_row_for_each_store(demo: Store) -> None:
    header, first, second, *notes = printed(report_of(demo, 1.0, 2.0)).splitlines()
    assert " ".join(header.split()) == (
        "store experts attention class bits, experts bits, all size perplexity mean NLL vs first tokens/s"
    )
    cells = " ".join(first.split())
    assert cells == "s0 hqq4:64 hqq4:64 int8 4.57 5.22 11.7 MiB 2.718 1.0000 ± 0.0000 +0.00 % 333.3"
    assert "7.389" in second and "+171.83 %" in second
    assert "3 tokens in 1 windows of at most 512, 2 predicted: a.txt (3)" in notes


def test_agreement_is_shown_only_with_a_reference_and_a_change_only_with_several_stores(demo: Store) -> None:
    alone, compared = printed(report_of(demo, 1.0)), printed(report_of(demo, 1.0, agrees=True))
    assert "vs first" not in alone and "same top" not in alone and "KL" not in alone
    assert "100.00 %  " in compared and "KL(reference || store)" in compared and "reference:" in compared


def test_a_terminal_that_is_too_narrow_gets_a_column_for_each_store(demo: Store) -> None:
    table = printed(report_of(demo, 1.0, 2.0), width=80, terminal=True).splitlines()
    assert [line.split() for line in table[:2]] == [["store", "s0", "s1"], ["experts", "hqq4:64", "hqq4:64"]]
    assert printed(report_of(demo, 1.0, 2.0), width=200, terminal=True).splitlines()[1].startswith("s0 ")


def test_json_of_an_infinite_perplexity_is_json(demo: Store) -> None:
    document = json.loads(printed(report_of(demo, 1.0, 1000.0), as_json=True), parse_constant=pytest.fail)
    assert [store["perplexity"] for store in document["stores"]] == [pytest.approx(math.e), None]
    assert (document["window"], document["num_predicted"], document["texts"][0]["evaluated"]) == (512, 2, 3)


def test_stores_are_named_by_their_directory_unless_two_have_the_same(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a/store", "b/store", "b/other")]
    assert short_names([paths[0], paths[2]]) == ["store", "other"]
    assert short_names([paths[0], paths[0]]) == ["store", "store"]
    assert short_names(paths) == [str(path) for path in paths]

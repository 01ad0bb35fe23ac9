"""What measures engines: `moray eval`, by an engine's own logits too, and the structure of `moray bench decode`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import moray
from moray.deploy.cli import app
from moray.deploy.config import demo_store
from moray.runtime.errors import RequestError
from moray.runtime.evaluation import Evaluation, TokenScores, cut_windows
from moray.runtime.generation.text import encode_file, require_tokenizer
from moray.runtime.store.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("session")]

IDS = [0, *range(100, 4000, 50)]
WINDOW = 32


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.py"
    file.write_text("import os\nimport sys\n\n\ndef main(argv=None):\n    return os.path.join(*argv)\n" * 3)
    return file


@dataclass(frozen=True)
class Answers:
    """Of an engine that has ended: nothing points into memory that went with it."""

    log_probs: torch.Tensor  # of each token but the first, by the engine's logits
    scores: TokenScores
    again: TokenScores  # with the first ones' top tokens as candidates
    text_ids: list[int]
    evaluation: Evaluation  # of windows of the text, each a forward pass of its own


@pytest.fixture(scope="module")
def answers(session: object, text: Path) -> Answers:
    ids, evaluation = encode_file(require_tokenizer(demo_store()), text), Evaluation()
    with moray.launch(hosts=2) as engine:
        log_probs = torch.log_softmax(engine.logits(IDS)[:-1], -1)
        scores = engine.score(IDS)
        again = engine.score(IDS, scores.top_ids)
        for window in cut_windows(ids, WINDOW):
            evaluation.add(engine.score(window))
        with pytest.raises(RequestError, match="not in the vocabulary"):
            engine.score([0, 999_999])
        with pytest.raises(RequestError, match="expected at least 2"):
            engine.score([0])
    return Answers(log_probs, scores, again, list(ids), evaluation)


def test_scores_are_those_of_the_engines_logits(answers: Answers) -> None:
    log_probs, scores, again = answers.log_probs, answers.scores, answers.again
    np.testing.assert_array_equal(scores.next_log_probs, log_probs[range(len(IDS) - 1), IDS[1:]])
    np.testing.assert_array_equal(scores.top_ids[:, 0], log_probs.argmax(-1))
    np.testing.assert_array_equal(scores.top_log_probs, log_probs.topk(64).values)
    np.testing.assert_array_equal(again.candidate_log_probs, scores.top_log_probs)
    np.testing.assert_array_equal(again.candidate_rest, scores.top_rest)
    assert scores.candidate_log_probs is None


def test_a_store_is_its_own_reference(text: Path, answers: Answers) -> None:
    arguments = ["eval", str(demo_store()), "--text", str(text), "--reference", str(demo_store())]
    result = CliRunner().invoke(app, [*arguments, "--window", str(WINDOW), "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    (store,) = document["stores"]
    assert (store["same_top_share"], store["mean_kl"], store["change"]) == (1.0, 0.0, 0.0)
    assert store["perplexity"] == document["reference"]["perplexity"]
    assert (store["recipe"]["experts"], store["numerics"]) == ("hqq4:64", "int8")
    # The same, by hand.
    ids, evaluation = answers.text_ids, answers.evaluation
    assert store["perplexity"] == evaluation.perplexity
    assert document["texts"] == [{"file": str(text), "tokens": len(ids), "evaluated": document["num_tokens"]}]
    assert document["num_windows"] == -(-document["num_tokens"] // WINDOW) > 1
    assert document["num_predicted"] == evaluation.num_predicted == document["num_tokens"] - document["num_windows"]


@pytest.mark.long  # the table itself is a unit test
def test_several_stores_make_one_table(text: Path) -> None:
    arguments = ["eval", str(demo_store()), str(demo_store()), "--text", str(text), "--max-tokens", "40"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    header, first, second, _, summary, *_ = result.stdout.splitlines()
    assert "vs first" in header and "same top" not in header
    assert "+0.00 %" in first and "+0.00 %" in second
    assert summary == "40 tokens in 1 windows of at most 512, 39 predicted: text.py (40)"


# -------------------------------------------------------------------------------------- bench decode


@pytest.mark.slow
def test_decode_as_json() -> None:
    arguments = [
        "--json",
        "--repeat",
        "2",
        "--new-tokens",
        "8",
        "--prompt-tokens",
        "5",
        "--hosts",
        "2",
        "--device",
        "cpu",
    ]
    result = CliRunner().invoke(app, ["bench", "decode", *arguments])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    settings = document["settings"]
    assert (settings["repeat"], settings["hosts"], settings["new_tokens"], settings["numerics"]) == (2, 2, 8, "int8")
    assert set(document["prefill_tokens_per_s"]) == {"64", "512"}
    for spread in (document["decode_tokens_per_s"], document["ratio"], *document["prefill_tokens_per_s"].values()):
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    token = document["token"]
    parts = ("kernel_s", "grouping_s", "leases_s", "rest_s")
    assert sum(token[part] for part in parts) == pytest.approx(token["total_s"])
    with Store.open(demo_store()) as store:
        layers = store.manifest.layers
    assert token["expert_bytes"] == sum(2 * layer.layout.num_bytes for layer in layers)  # 2 experts a token
    assert document["idle_cpu"]["num_processes"] >= 4  # compute, two hosts, the orchestrator

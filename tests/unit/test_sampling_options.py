"""Penalties, biases, log-probabilities and deadlines: against their definitions, and through the step loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.runtime.errors import RequestError
from moray.runtime.generation.request import GenerationRequest, SamplingParams, TokenEvent
from moray.runtime.generation.runner import Runner
from moray.runtime.generation.sampler import Sampler
from moray.runtime.generation.vocabulary import token_bytes

PROMPT = "import os\nimport sys\n\n\ndef main(argv=None):\n"
VOCABULARY = 20
tokens = st.lists(st.integers(0, VOCABULARY - 1), max_size=12)
penalty = st.floats(-2, 2)


def run(runner: Runner, count: int = 40, timeout_s: float | None = None, **sampling: object) -> list[TokenEvent]:
    request = GenerationRequest(
        f"options-{sampling}", runner.encode(PROMPT), count, SamplingParams(**sampling), timeout_s=timeout_s
    )
    return list(runner.stream(request))


def ids_of(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


@settings(max_examples=40, deadline=None)
@given(tokens, tokens, penalty, penalty, st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-100, 100)))
def test_penalties_and_biases_are_the_formula(
    prompt: list[int], generated: list[int], presence: float, frequency: float, bias: dict[int, float]
) -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence + bias[j], with c counted in the generated tokens only."""
    params = SamplingParams(presence_penalty=presence, frequency_penalty=frequency, logit_bias=tuple(bias.items()))
    sampler = Sampler(params, num_prompt=len(prompt))
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(len(generated)))
    kept = logits.clone()
    ids = list(prompt)
    for token in [*generated, 0]:  # token by token, as the step loop asks
        counts = [ids[len(prompt) :].count(i) for i in range(VOCABULARY)]
        expected = [
            float(logits[i]) - counts[i] * frequency - (counts[i] > 0) * presence + bias.get(i, 0.0)
            for i in range(VOCABULARY)
        ]
        chosen = sampler.sample(ids, logits)
        assert expected[chosen] == pytest.approx(max(expected), abs=1e-4)
        ids.append(token)
    assert torch.equal(logits, kept)


def test_log_probs_are_the_model_s_whatever_is_sampled(demo_runner: Runner) -> None:
    options = {"temperature": 1.5, "seed": 5, "logit_bias": ((300, 50.0),), "num_log_probs": 3}
    events = run(demo_runner, 12, **options)
    prompt, ids = list(demo_runner.encode(PROMPT)), ids_of(events)
    assert set(ids) == {300}  # the bias decides, and the probabilities below do not know of it
    expected = demo_runner.logits(prompt + ids)[len(prompt) - 1 : -1].log_softmax(-1)
    found = [entry for event in events for entry in event.log_probs]
    assert [entry.token_id for entry in found] == ids
    for entry, row in zip(found, expected, strict=True):
        assert entry.log_prob == pytest.approx(float(row[entry.token_id]), abs=1e-3)
        assert [log_prob for _, log_prob in entry.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)
    assert all(not event.log_probs for event in run(demo_runner, 3))


def test_options_that_change_nothing_change_no_token(demo_runner: Runner) -> None:
    plain = ids_of(run(demo_runner))
    assert ids_of(run(demo_runner, logit_bias=((7, 0.0),), num_log_probs=0, timeout_s=600.0)) == plain
    assert ids_of(run(demo_runner, frequency_penalty=1.5)) != plain
    banned = plain[0]
    assert banned not in ids_of(run(demo_runner, logit_bias=((banned, -100.0),)))


def test_a_request_past_its_deadline_ends_and_says_so(demo_runner: Runner) -> None:
    last = run(demo_runner, 1900, timeout_s=1e-6)[-1]
    assert last.finished is not None and last.finished.reason == "deadline"
    assert last.finished.usage.completion_tokens <= 1
    assert run(demo_runner, 3)[-1].finished.reason == "length"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"presence_penalty": 2.1}, "presence_penalty is 2.1, expected -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ({"logit_bias": ((5, 101.0),)}, "logit_bias of token 5 is 101.0"),
        ({"logit_bias": ((1_000_000, 1.0),)}, "not in the vocabulary"),
        ({"num_log_probs": 21}, "num_log_probs is 21, expected 0 to 20"),
        ({"timeout_s": 0.0}, "timeout_s is 0.0"),
    ],
)
def test_wrong_options_are_refused(demo_runner: Runner, options: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        run(demo_runner, **options)


def test_tokens_write_the_bytes_of_their_text(demo_runner: Runner) -> None:
    table = token_bytes(demo_runner.tokenizer, demo_runner.model.config.vocab_size)
    text = "def main():\n    print('héllo ✓ 漢')\n"
    ids = demo_runner.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(table[i] for i in ids) == text.encode()
    assert table[0] == b"<s>" and len(table) == demo_runner.model.config.vocab_size

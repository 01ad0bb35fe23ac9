"""What forward passes take, and what is decided by it: the turns and sizes of chunks, tokens computed ahead."""

from __future__ import annotations

import pytest

from moray.runtime.generation.speculation import PromptLookup, num_worthwhile
from moray.runtime.generation.step_cost import Pacer, StepCost


def cost_of(fixed: float, per_token: float, sizes: tuple[int, ...] = (1, 2, 8)) -> StepCost:
    cost = StepCost()
    for tokens in sizes * 10:
        cost.note(tokens, fixed + per_token * tokens)
    return cost


def test_a_line_is_found_and_one_suspended_process_does_not_bend_it() -> None:
    cost = cost_of(0.5, 0.01)
    assert cost.line() == pytest.approx((0.5, 0.01))
    cost.note(8, 600.0)
    assert cost.seconds(8) < 2.0
    assert StepCost().line() == (0.0, 0.0)
    assert cost_of(0.0, 0.25, sizes=(4,)).line() == pytest.approx((0.0, 0.25))


def test_prompts_get_their_share_of_the_time_and_no_more() -> None:
    """One prompt beside four that decode: half. Six beside two: three quarters."""
    for num_prompts, num_decoding, share in ((1, 4, 0.5), (6, 2, 0.75), (3, 2, 0.6)):
        pacer, spent = Pacer(512, can_shrink=True), [0.0, 0.0]
        for _ in range(2000):
            if pacer.is_due(num_decoding):
                tokens = pacer.chunk(num_decoding)
                pacer.note_chunk(tokens, 0.5 + 0.02 * tokens, num_prompts, num_decoding)
                spent[0] += 0.5 + 0.02 * tokens
            pacer.note_step(num_decoding, 0.6)
            spent[1] += 0.6
        assert spent[0] / sum(spent) == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize(
    ("fixed", "per_token", "low", "high"),
    [
        (0.5, 0.02, 80, 100),  # four steps of 0.6 s
        (10.0, 0.02, 490, 512),  # a pass costs that much whatever it computes: loading experts
        (0.0, 1.0, 16, 16),  # the least
    ],
)
def test_chunks_shrink_while_others_decode(fixed: float, per_token: float, low: int, high: int) -> None:
    pacer = Pacer(512, can_shrink=True)
    assert pacer.chunk(0) == 512 and pacer.chunk(4) == 64  # nothing is known
    for tokens in (64, 128, 512) * 5:
        pacer.note_chunk(tokens, fixed + per_token * tokens, 1, 0)
        pacer.note_step(4, 0.6)
    assert low <= pacer.chunk(4) <= high
    assert pacer.chunk(0) == 512


def test_nobody_waits_for_those_that_have_ended() -> None:
    pacer = Pacer(512, can_shrink=False)
    pacer.note_chunk(512, 60.0, 1, 3)
    assert not pacer.is_due(3) and pacer.chunk(3) == 512
    assert pacer.is_due(0) and pacer.is_due(3)


def test_tokens_are_computed_ahead_while_they_cost_less_than_they_save() -> None:
    cheap, dear = cost_of(1.0, 0.01), cost_of(0.1, 1.0)
    assert num_worthwhile(0.9, cheap, 1) > num_worthwhile(0.5, cheap, 1) > 0 == num_worthwhile(0.9, dear, 4)
    assert num_worthwhile(0.9, StepCost(), 1) == 0
    assert num_worthwhile(0.5, cheap, 32) < num_worthwhile(0.5, cheap, 1)


def test_a_lookup_proposes_what_followed_last_time_and_gives_up_where_it_is_wrong() -> None:
    lookup, cost = PromptLookup(), cost_of(1.0, 0.001)
    ids = [1, 2, 3, 7, 8, 1, 2, 3, 9, 8, 5, 1, 2, 3]
    assert list(lookup.propose(ids, 8, cost, 1))[:4] == [9, 8, 5, 1]
    assert list(lookup.propose(ids, 2, cost, 1)) == [9, 8]
    assert not lookup.propose([*ids, 4], 8, cost, 1) and not lookup.propose([*ids, 4, 1, 2, 3], 0, cost, 1)
    proposed = []
    for _ in range(300):
        proposed.append(len(lookup.propose([*ids, 4, 1, 2, 3], 8, cost_of(1.0, 0.3), 1)))
        if proposed[-1]:
            lookup.note(proposed[-1], 0)
    assert 0 < sum(map(bool, proposed[100:])) <= 4  # now and then it is tried again

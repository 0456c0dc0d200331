"""Work shared out among ranks: nothing twice, nothing lost, nobody idle for long."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agentft.runtime import share_out


@given(st.lists(st.integers(0, 10_000), max_size=60), st.integers(1, 9))
def test_shares_cover_the_work_once_and_hold_even_numbers(costs, ranks):
    shares = share_out(costs, ranks)
    assert len(shares) == ranks
    assert sorted(position for share in shares for position in share) == list(range(len(costs)))
    assert all(len(share) <= -(-len(costs) // ranks) for share in shares)
    assert all(share == sorted(share) for share in shares)


@given(st.lists(st.integers(1, 1_000), min_size=1, max_size=60), st.integers(1, 8))
def test_the_busiest_rank_has_at_most_one_item_more_than_the_mean(costs, ranks):
    """Longest first: the busiest rank exceeds the mean by at most the largest item."""
    loads = [sum(costs[position] for position in share) for share in share_out(costs, ranks)]
    assert max(loads) <= sum(costs) / ranks + max(costs)


def test_one_rank_does_everything_in_order():
    assert share_out([3, 9, 1, 7], 1) == [[0, 1, 2, 3]]


def test_the_long_ones_go_to_different_ranks():
    assert share_out([900, 800, 100, 90], 2) == [[0, 3], [1, 2]]

"""Who of several ranks does which part of a common list of work, decided alike on every rank without a word between them."""

from __future__ import annotations

from collections.abc import Sequence


def share_out(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Return the positions that each rank works on, in their order; the shares cover the list once.

    Costly items go first, each to the rank that has least so far among those that have not their number yet. No rank gets
    more than its even number of items, rounded up: where every item is an exchange between ranks, that decides the time.
    """
    most = -(-len(costs) // ranks)
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for position in sorted(range(len(costs)), key=lambda at: -costs[at]):
        rank = min((r for r in range(ranks) if len(shares[r]) < most), key=lambda r: (loads[r], r))
        shares[rank].append(position)
        loads[rank] += costs[position]
    return [sorted(share) for share in shares]

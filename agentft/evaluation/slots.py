"""A key-value cache of fixed slots, filled row by row: what lets finished answers make room for new ones.

Axes: S slots, H key-value heads, P positions, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache, DynamicLayer


class SlotLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values, `[S, H, P, D]`, allocated once; row s holds its positions from 0 on."""

    def __init__(self, slots: int, positions: int) -> None:
        super().__init__()
        self._slots = slots
        self._positions = positions
        self.rows: torch.Tensor
        self.columns: torch.Tensor
        self.limit = 0

    def allocate(self, like_HPD: torch.Tensor) -> None:
        """Make the buffers in the shape and dtype of one row's keys."""
        heads, _, width = like_HPD.shape
        self.keys = like_HPD.new_zeros(self._slots, heads, self._positions, width)
        self.values = torch.zeros_like(self.keys)
        self.is_initialized = True

    def load(self, slot: int, keys_HPD: torch.Tensor, values_HPD: torch.Tensor) -> None:
        """Put a prefix into a slot."""
        if not self.is_initialized:
            self.allocate(keys_HPD)
        length = keys_HPD.shape[-2]
        self.keys[slot, :, :length] = keys_HPD
        self.values[slot, :, :length] = values_HPD

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new positions `[R, H, Q, D]` of the active rows and return those rows up to `limit`."""
        # Advanced indices around a slice put the indexed axes first: [R, Q, H, D].
        self.keys[self.rows[:, None], :, self.columns] = key_states.transpose(1, 2)
        self.values[self.rows[:, None], :, self.columns] = value_states.transpose(1, 2)
        if len(self.rows) == self._slots:
            return self.keys[:, :, : self.limit], self.values[:, :, : self.limit]
        return self.keys[self.rows, :, : self.limit], self.values[self.rows, :, : self.limit]

    def get_seq_length(self) -> int:
        """Return the positions that attention sees."""
        return self.limit


class SlotCache(Cache):  # type: ignore[misc]
    """The slots of all layers, moved together."""

    def __init__(self, layers: int, slots: int, positions: int) -> None:
        self._slot_layers = [SlotLayer(slots, positions) for _ in range(layers)]
        super().__init__(layers=list(self._slot_layers))

    def load(self, slot: int, prefix: Sequence[tuple[torch.Tensor, torch.Tensor]], length: int) -> None:
        """Fill a slot with the first `length` positions of a prefilled conversation, `[H, P, D]` per layer."""
        for layer, (keys, values) in zip(self._slot_layers, prefix, strict=True):
            layer.load(slot, keys[:, :length], values[:, :length])

    def aim(self, rows: torch.Tensor, columns_RQ: torch.Tensor) -> None:
        """Say where the next forward pass writes: row r's new tokens go to slot `rows[r]`, positions `columns[r]`."""
        limit = int(columns_RQ.max()) + 1
        for layer in self._slot_layers:
            layer.rows, layer.columns, layer.limit = rows, columns_RQ, limit

"""Decoding of recurrent models: one state per row, whatever its length."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch as th
from transformers import DynamicCache

from agents.decoder import CachedDecoder, cache_of
from agents.states import run


class StateDecoder(CachedDecoder):
    """The last hidden state of every row, with the model's own recurrent states in the slots.

    A state cannot be cut at a token, and padding would go into it. So rows that begin are prefilled
    with others of the same length only; then all rows take their newest token in one step.
    """

    def _forget_rows(self) -> None:
        super()._forget_rows()
        self._states: DynamicCache | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is cached, too."""
        return {**super().__getstate__(), "_states": None}

    def held_bytes(self) -> int:
        """Return the size of the states."""
        return 0 if self._states is None else sum(t.nbytes for *_, t in tensors(self._states))

    def _open(self, longest: int) -> None:
        self._states = None

    def _keep(self, slots: th.Tensor) -> None:
        if self._states is not None:
            for found, place, states in tensors(self._states):
                found[place] = states[slots]

    def _go_on(self, ids: th.Tensor, length: th.Tensor, fresh: th.Tensor) -> th.Tensor:
        known = length[fresh] - 1
        if self._states is None:
            self._states = self._empty(len(ids))
        for _, _, states in tensors(self._states):
            states[fresh] = 0
        for n_tokens in known[known > 0].unique().tolist():
            rows = fresh[known == n_tokens]
            made = cache_of(self._source)
            self._run(ids[rows, :n_tokens], made)
            for (_, _, old), (_, _, new) in zip(tensors(self._states), tensors(made), strict=True):
                old[rows] = new
        return self._run(ids.gather(1, length[:, None] - 1), self._states)[:, -1]

    def _empty(self, n_slots: int) -> DynamicCache:
        """Make states of `n_slots` rows that have seen nothing, which are 0."""
        cache = cache_of(self._source)
        self._run(th.zeros(1, 1, dtype=th.long, device=self._source.device), cache)
        for found, place, states in list(tensors(cache)):
            found[place] = states.new_zeros(n_slots, *states.shape[1:])
        return cache

    def _run(self, ids: th.Tensor, cache: DynamicCache) -> th.Tensor:
        """Run ids (k, n) on from the states in `cache`, which it brings up to date."""
        takes = inspect.signature(self.lm.forward).parameters
        name = "cache_params" if "cache_params" in takes else "past_key_values"
        return run(self.lm, input_ids=ids, **{name: cache}, use_cache=True)


def tensors(cache: DynamicCache) -> Iterator[tuple[dict[int, th.Tensor], int, th.Tensor]]:
    """Yield the states in a cache, each (n_rows, ...), and where they are kept: dict and key."""
    for layer in cache.layers:
        for found in (layer.conv_states, layer.recurrent_states):
            for place, states in found.items():
                if states is not None:
                    yield found, place, states

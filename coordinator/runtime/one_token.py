"""Steps of one token: their inputs are written where they are sent from."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from coordinator.runtime.evaluate import Evaluator, Places, Shipped
from coordinator.runtime.inputs import CrossMasks, text_inputs

_CHANGING = frozenset({"inp_tokens", "inp_pos", "attn_inp_k_idxs", "attn_inp_v_idxs", "attn_inp_kq_mask"})
_LASTING = frozenset({"out_ids", "cross_mask", "row_mask"})  # the same from the end of the prompt on


class TokenInputs:
    """Inputs of steps of one token, written in place: from a token to the next one only a few bytes change."""

    @classmethod
    def of(cls, places: Mapping[str, memoryview], n_kv: int) -> TokenInputs | None:
        """`places` are the inputs' bytes by name. None when a token has not all of them, or more: debug tensors."""
        names = places.keys()
        return cls(places, n_kv) if names >= _CHANGING and names <= _CHANGING | _LASTING else None

    def __init__(self, places: Mapping[str, memoryview], n_kv: int) -> None:
        self.places, self.n_kv = places, n_kv
        self._next = -1
        self._masks: CrossMasks | None = None
        self._token, self._position = places["inp_tokens"].cast("i"), places["inp_pos"].cast("i")
        self._cells = [places[name].cast("q") for name in ("attn_inp_k_idxs", "attn_inp_v_idxs")]
        self._visible = places["attn_inp_kq_mask"].cast("H")

    def set(self, token: int, n_past: int, masks: CrossMasks | None) -> None:
        """`token` at position `n_past`; `masks` when there are images."""
        follows = n_past == self._next and masks is self._masks and (masks is None or n_past >= len(masks.visible))
        self._next, self._masks = n_past + 1, masks
        if not follows:
            values = text_inputs([token], n_past, self.n_kv) | ({} if masks is None else masks.rows(n_past, 1))
            for name, place in self.places.items():
                place[:] = np.ascontiguousarray(values[name]).data.cast("B")
            return
        self._token[0] = token
        self._position[0] = n_past
        for cell in self._cells:
            cell[0] = n_past
        self._visible[n_past] = 0  # as a half-precision number, too


class OneToken:
    """Writes a session's tokens for the program that takes them, which is mostly the last one again."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator
        self._shipped: Shipped | None = None
        self._places: Places | None = None
        self._inputs: TokenInputs | None = None

    def places(self, shipped: Shipped, n_kv: int) -> Places | None:
        """Where `set` writes for a program of one token; None when it does not, since there are other inputs."""
        if shipped is not self._shipped:
            self._shipped = shipped
            self._places = places = self.evaluator.places(shipped)
            self._inputs = None if places is None else TokenInputs.of(places.inputs, n_kv)
        return self._places if self._inputs is not None else None

    def set(self, token: int, n_past: int, masks: CrossMasks | None) -> None:
        """As TokenInputs, for the program that `places` was last asked for."""
        assert self._inputs is not None
        self._inputs.set(token, n_past, masks)

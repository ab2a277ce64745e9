"""States of all layers in the shape that `generate` expects of a cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from miras.errors import UsageError
from miras.layer import LayerState


class MirasCacheLayer(CacheLayerMixin):
    """One layer's state. It has no keys and values to update; the model replaces `state` as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.state: LayerState | None = None
        self.seen = 0

    def put(self, state: LayerState, tokens: int) -> None:
        """Take the state after `tokens` more tokens."""
        self.state, self.seen, self.is_initialized = state, self.seen + tokens, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate: a state comes whole."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: there are no keys and values here."""
        raise UsageError(
            "MirasCacheLayer: the model puts whole states into it; there are no keys and values to update."
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of an attention mask."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No limit (the name before transformers 5.17)."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.seen = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of the surviving beams."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in that order."""
        if self.state is not None:
            self.state = self.state.index_select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        if self.state is not None:
            self.state = self.state.fork(repeats)

    def crop(self, max_length: int) -> None:
        """Refused: what a memory has learned cannot be taken back."""
        raise UsageError(
            "MirasCache: a memory cannot unlearn tokens, so its cache cannot be cropped to "
            f"{max_length}; keep a copy of the state (copy.deepcopy(cache)) where you want to return to."
        )


class MirasCache(Cache):
    """One `MirasCacheLayer` per layer.

    Args:
        layers: number of layers.
    """

    def __init__(self, layers: int) -> None:
        self.held = [MirasCacheLayer() for _ in range(layers)]
        super().__init__(layers=list(self.held))

    def states(self) -> list[LayerState]:
        """The states; empty before the first token."""
        return [layer.state for layer in self.held if layer.state is not None]

    def put(self, states: list[LayerState], tokens: int) -> None:
        """Take the states after `tokens` more tokens."""
        for layer, state in zip(self.held, states, strict=True):
            layer.put(state, tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(layer.state.nbytes for layer in self.held if layer.state is not None)

    def detach(self) -> MirasCache:
        """Cut the outer gradient at this point, for truncated backpropagation through time."""
        for layer in self.held:
            if layer.state is not None:
                layer.state = layer.state.detach()
        return self

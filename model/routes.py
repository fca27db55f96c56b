"""The routes of tokens: which experts they go through, chosen, kept or replayed.

    routes [T, L, K]: the K experts of each token in each of the L layers that have experts

A router that reads the same tokens twice need not choose the same experts twice. Engine and trainer
round differently, and where two experts score about alike the last digit decides. A token that took
other experts has another probability, so the importance ratio of RL is wrong. Hence the engine
keeps the routes of what it samples, and the trainer replays them (R3, arXiv 2510.11370).

Only the choice is replayed. The gates are the trainer's own, from the scores of all experts, so the
router learns as ever (moe.py).

A sequence of n tokens has n - 1 routes: its last token was sampled, and never read by the model.

Left out: routes in files, and those of a sampler of another make.

Shapes: T tokens, L layers with experts, K experts per token.
"""

from collections.abc import Sequence

import numpy as np
import torch

from .config import ModelConfig

UNKNOWN = -1  # in the place of an expert, where a token has no route


def route_shape(config: ModelConfig) -> tuple[int, int]:
    """(L, K) of a model; (0, 0) of a dense one."""
    if config.moe is None:
        return 0, 0
    return config.n_layers - len(config.moe.dense_layers), config.moe.experts_per_token


def route_dtype(config: ModelConfig) -> torch.dtype:
    """What routes are kept in: a byte per expert, if that is enough, else two (MOST_EXPERTS)."""
    return torch.uint8 if config.moe.n_experts <= 256 else torch.int16


def route_bytes(config: ModelConfig) -> int:
    """Bytes of the routes of one token of a mixture."""
    n_layers, n_chosen = route_shape(config)
    return n_layers * n_chosen * route_dtype(config).itemsize


def differ(routes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """[...] bool for routes [..., K]: whether the experts are others, in whatever order."""
    return (routes.sort(-1).values != others.sort(-1).values).any(-1)


class Routing:
    """What the routers of one forward pass share. A subclass may keep their choices."""

    def __init__(self, replayed_TLK: torch.Tensor | None = None):
        """replayed_TLK: routes to replay, of any integer dtype. A token with negative numbers has
        none, and its routers choose. None: all choose."""
        self.replayed_TLK = replayed_TLK
        self._flipped: dict[int, torch.Tensor] = {}

    def take(self, layer: int, chosen_TK: torch.Tensor) -> torch.Tensor:
        """The experts [T, K] that the tokens go through.

        layer: among those with experts. chosen_TK: what its router would take. Raises ValueError
        for routes of another number of tokens or experts, or without this layer. (How many layers
        there are, only check_routes knows.)
        """
        experts_TK = chosen_TK
        if self.replayed_TLK is not None:
            experts_TK = self._replayed(layer, chosen_TK)
        self.keep(layer, experts_TK)
        return experts_TK

    def _replayed(self, layer: int, chosen_TK: torch.Tensor) -> torch.Tensor:
        n_tokens, n_chosen = chosen_TK.shape
        found = tuple(self.replayed_TLK.shape)
        if found[::2] != (n_tokens, n_chosen) or layer >= found[1]:
            raise ValueError(
                f"routes are {list(found)}, but layer {layer} has {n_tokens} tokens x {n_chosen} "
                "experts; expected the routes of these tokens, from this model"
            )
        replayed_TK = self.replayed_TLK[:, layer].long()
        experts_TK = torch.where(replayed_TK < 0, chosen_TK, replayed_TK)
        # By layer: what is computed again for the backward pass is not counted again.
        self._flipped[layer] = differ(chosen_TK, experts_TK)
        return experts_TK

    def keep(self, layer: int, experts_TK: torch.Tensor) -> None:
        """See the experts of a layer, for a subclass that keeps them."""

    def flipped(self) -> torch.Tensor | None:
        """[T, L] bool: where a router's own choice is another than the replayed one. None if
        nothing was replayed."""
        if not self._flipped:
            return None
        return torch.stack([self._flipped[layer] for layer in sorted(self._flipped)], dim=1)


class RecordedRouting(Routing):
    """Keeps the routes of one forward pass."""

    def __init__(self, replayed_TLK: torch.Tensor | None = None):
        super().__init__(replayed_TLK)
        self.kept: dict[int, torch.Tensor] = {}

    def keep(self, layer, experts_TK):
        self.kept[layer] = experts_TK

    def routes(self, config: ModelConfig) -> np.ndarray | None:
        """[T, L, K], as the engine gives them; None of a dense model."""
        if not self.kept:
            return None
        layers = [self.kept[layer] for layer in sorted(self.kept)]
        return torch.stack(layers, dim=1).to(route_dtype(config)).cpu().numpy()


def check_routes(routes: Sequence[np.ndarray], lengths: Sequence[int], config: ModelConfig) -> None:
    """Raise ValueError unless these are routes that the model could have taken.

    routes: an array [n - 1, L, K] per sequence; lengths: the n tokens of each.
    """
    if config.moe is None:
        raise ValueError("routes: got some, but the model is dense; expected None")
    if len(routes) != len(lengths):
        raise ValueError(f"routes: got {len(routes)} arrays for {len(lengths)} sequences")
    for number, (array, length) in enumerate(zip(routes, lengths, strict=True)):
        _check_sequence(array, (int(length) - 1, *route_shape(config)), number)
    if routes:
        _check_experts(np.concatenate(routes), config.moe.n_experts)


def _check_sequence(array: np.ndarray, expected: tuple[int, int, int], number: int) -> None:
    if array.shape != expected or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"routes: those of sequence {number} are {list(array.shape)} {array.dtype}, expected "
            f"{list(expected)} integers: all tokens but the last, layers with experts, experts per "
            "token; are they of this answer, and of this model?"
        )


def _check_experts(routes_TLK: np.ndarray, n_experts: int) -> None:
    if routes_TLK.size == 0:
        return
    for worst in (routes_TLK.min(), routes_TLK.max()):
        if not 0 <= worst < n_experts:
            raise ValueError(
                f"routes: expert {worst} is none of the model's, expected 0 to {n_experts - 1}; "
                "were they sampled from another model?"
            )
    ordered = np.sort(routes_TLK, axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise ValueError(
            "routes: a token goes through an expert twice, expected different experts in each layer"
        )

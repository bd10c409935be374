"""Rotary positions: queries and keys turn with their position. Built in chapter 8 of the book."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from mha_lib._checks import check_bool, check_frequencies, check_rotary


class RotaryEmbedding(nn.Module):
    """Turn pairs of features by angles that grow with the position.

    Feature pair ``m`` of the token at position ``p`` is turned by ``p * base ** (-2 m / dim)``. The score of a turned
    query with a turned key depends on the distance of their positions, not on the positions. The first ``dim``
    features are turned, the others stay.

    Angles are float32 whatever dtype the module is converted to, and computed when they are needed: there is no table
    that could be too short, and nothing in the ``state_dict``.

    Args:
        dim: How many features to turn, even and at most the head dimension.
        base: Sets the slowest turn; 10000 in the paper.
        interleaved: Whether the features of a pair are neighbours, as in the paper; if not, feature ``m`` and
            ``m + dim / 2`` are a pair, as in GPT-NeoX and the Llama of transformers.
        frequencies: Radians a position for each pair, shape ``(dim / 2,)``, in place of the powers of ``base``.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``dim`` is odd or below 2, ``base`` is not positive, or ``frequencies`` do not fit.

    Source: Su et al., "RoFormer" (2021), section 3.2.2.

    Example:
        >>> import torch
        >>> rotary = RotaryEmbedding(2, frequencies=torch.tensor([torch.pi / 2]))
        >>> rotary(torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])).round(decimals=3).abs()
        tensor([[[[1., 0.],
                  [0., 1.]]]])
    """

    def __init__(
        self,
        dim: int,
        *,
        base: float = 10000.0,
        interleaved: bool = False,
        frequencies: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.base = check_frequencies(dim, base, frequencies)
        self.interleaved = check_bool("interleaved", interleaved)
        if frequencies is None:
            exponents = torch.arange(0, self.dim, 2, device="cpu", dtype=torch.float64) / self.dim
            frequencies = self.base**-exponents
            device = torch.get_default_device()
            frequencies = frequencies.to("cpu" if device.type == "meta" else device)
        self.frequencies = frequencies.detach().to(torch.float32, copy=True)

    def forward(self, x: Tensor, offset: int | Tensor = 0) -> Tensor:
        """Turn the features of ``x``.

        Args:
            x: Queries or keys, shape ``(b, h, n, d)``.
            offset: Position of the first token, an int or one integer for each sample, shape ``(b,)``.

        Returns:
            Shape ``(b, h, n, d)``, in the dtype of ``x``.

        Raises:
            TypeError: An argument has the wrong type or dtype.
            ValueError: ``x`` has another rank than four or fewer than ``dim`` features, or ``offset`` does not fit.
        """
        offset = check_rotary(x, offset, self.dim)
        if isinstance(offset, Tensor):
            offset = rearrange(offset, "b -> b 1 1")
        positions = offset + rearrange(torch.arange(x.shape[-2], device=x.device), "n -> n 1")
        angles = positions.float() * self.frequencies.to(x.device)
        cos, sin = (
            rearrange(part, "... n d -> ... 1 n d") for part in (angles.cos(), angles.sin())
        )
        pattern = "b h n (d two)" if self.interleaved else "b h n (two d)"
        first, second = rearrange(x[..., : self.dim], f"{pattern} -> two b h n d", two=2)
        turned = [first * cos - second * sin, second * cos + first * sin]
        turned = rearrange(turned, f"two b h n d -> {pattern}").to(x.dtype)
        return torch.cat([turned, x[..., self.dim :]], dim=-1) if self.dim < x.shape[-1] else turned

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        """Move the frequencies with the module, but keep them float32; on meta they keep their numbers."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(self.frequencies).device
        if device.type != "meta":
            self.frequencies = self.frequencies.to(device)
        return self

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"dim={self.dim}, base={self.base}, interleaved={self.interleaved}"

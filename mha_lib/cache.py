"""The key/value cache: a model that writes token by token keeps what it has read. Built in chapter 5 of the book."""

from __future__ import annotations

import torch
from torch import Tensor

from mha_lib._checks import check_append, check_device, check_floating_dtype, check_int


class KVCache:
    """Keys and values of the tokens so far, in memory that is taken once.

    ``append`` writes behind what is there and returns views of all of it: nothing is copied twice. One cache serves
    one layer. It holds ``2 * batch_size * num_kv_heads * max_length * head_dim`` numbers.

    Args:
        batch_size: Samples, ``b``.
        num_kv_heads: Key/value heads, ``k``.
        head_dim: Features of one head, ``d``.
        max_length: How many tokens fit.
        device: Where to keep them.
        dtype: A floating dtype; torch's default if None.

    Attributes:
        length: How many tokens are there.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A size is below 1, or ``max_length`` below 0.

    Example:
        >>> cache = KVCache(1, 2, 4, max_length=8)
        >>> keys, values = cache.append(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
        >>> keys.shape, cache.length
        (torch.Size([1, 2, 3, 4]), 3)
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        max_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (
            check_int("batch_size", batch_size, minimum=1),
            check_int("num_kv_heads", num_kv_heads, minimum=1),
            check_int("max_length", max_length, minimum=0),
            check_int("head_dim", head_dim, minimum=1),
        )
        check_device("device", device)
        dtype = check_floating_dtype("dtype", dtype)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.length = 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens and return all that are there. If anything is wrong, the cache stays as it was.

        Args:
            key: Shape ``(b, k, n, d)``; zero tokens may be added.
            value: Shape ``(b, k, n, d)``.

        Returns:
            All keys and all values, views of shape ``(b, k, length, d)``.

        Raises:
            TypeError: ``key`` or ``value`` is not a tensor.
            ValueError: Shapes, dtypes or devices do not fit, the tokens exceed ``max_length``, or a gradient would
                have to flow into the cache.
        """
        check_append(key, value, self.keys, self.length)
        end = self.length + key.shape[2]
        self.keys[:, :, self.length : end] = key
        self.values[:, :, self.length : end] = value
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def truncate(self, length: int) -> None:
        """Forget all tokens from position ``length`` on.

        Args:
            length: How many tokens stay.

        Raises:
            TypeError: ``length`` is not an int.
            ValueError: ``length`` is below 0 or above the cache's.
        """
        if check_int("length", length, minimum=0) > self.length:
            raise ValueError(f"length must be at most the cache's, {self.length}, got {length}")
        self.length = int(length)

    def reset(self) -> None:
        """Forget all tokens."""
        self.length = 0

    def __repr__(self) -> str:
        batch, heads, max_length, head_dim = self.keys.shape
        return (
            f"KVCache({batch}, {heads}, {head_dim}, max_length={max_length}, "
            f"dtype={self.keys.dtype}, device={self.keys.device}, length={self.length})"
        )

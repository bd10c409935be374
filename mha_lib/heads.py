"""The split into heads and the way back: two einops patterns. Built in chapter 2 of the book."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from mha_lib._checks import check_split, check_tensor


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """Cut the features of each token into heads.

    The features of head ``h`` are the ``head_dim`` neighbours that start at ``h * head_dim``. The result is a view
    of ``x``: nothing is copied.

    Args:
        x: Shape ``(b, n, h d)``.
        head_dim: Features of one head, ``d``.

    Returns:
        Shape ``(b, h, n, d)``.

    Raises:
        TypeError: ``x`` is not a tensor or ``head_dim`` is not an int.
        ValueError: ``x`` has another rank than three, or ``head_dim`` does not divide its last axis.

    Example:
        >>> import torch
        >>> split_heads(torch.zeros(2, 5, 12), head_dim=4).shape
        torch.Size([2, 3, 5, 4])
    """
    check_split(x, head_dim)
    return rearrange(x, "b n (h d) -> b h n d", d=head_dim)


def merge_heads(x: Tensor) -> Tensor:
    """Put the heads of each token side by side again: the inverse of :func:`split_heads`.

    Args:
        x: Shape ``(b, h, n, d)``.

    Returns:
        Shape ``(b, n, h d)``.

    Raises:
        TypeError: ``x`` is not a tensor.
        ValueError: ``x`` has another rank than four.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 5, 12)
        >>> torch.equal(merge_heads(split_heads(x, head_dim=4)), x)
        True
    """
    check_tensor("x", x, axes="batch heads sequence head_dim")
    return rearrange(x, "b h n d -> b n (h d)")

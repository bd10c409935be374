"""Argument checks: plain code with no attention in it, and the only code of the library the book does not show.

Every message names the argument, says what was expected and what came. Types to test for stand in tuples, since torch
2.6 cannot trace ``isinstance(x, A | B)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from numbers import Integral, Real

import torch
from torch import Tensor

PLOT_SLACK = 1e-3
"""Sums of weights may leave 0 .. 1 by rounding; a picture does not show it."""


def check_int(name: str, value: object, *, minimum: int) -> int:
    """Return ``value`` as an int if it is an integer, numpy's included, of at least ``minimum``."""
    number = _as_int(name, value, "an int")
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


def check_bool(name: str, value: object) -> bool:
    """Return ``value`` if it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {_describe(value)}")
    return value


def check_real(name: str, value: object) -> float:
    """Return ``value`` as a float if it is a finite number, numpy's included."""
    if isinstance(value, (bool, Fraction)) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {_describe(value)}")
    number = float(value)
    if not abs(number) < math.inf:
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def check_tensor(name: str, value: object, *, axes: str) -> Tensor:
    """Return ``value`` if it is a dense tensor with one axis for each word of ``axes``."""
    tensor = _dense(name, value)
    expected = axes.split()
    if tensor.ndim != len(expected):
        unbatched = expected[0] == "batch" and tensor.ndim == len(expected) - 1
        advice = f"for a single sample write {name}[None]" if unbatched else ""
        wanted = ", ".join(expected) + ("," if len(expected) == 1 else "")
        raise ValueError(
            f"{name} must have shape ({wanted}), got {_shape(tensor)}" + _advice(advice)
        )
    return tensor


def check_floating(name: str, value: Tensor) -> Tensor:
    """Return ``value`` if its dtype is a floating one that torch can calculate with."""
    if not _is_floating(value.dtype):
        raise TypeError(f"{name} must have a floating dtype of 16 bits or more, got {value.dtype}")
    return value


def check_floating_dtype(name: str, value: object) -> torch.dtype:
    """Return ``value`` if it is a floating dtype, and torch's default dtype for None."""
    if value is None:
        return torch.get_default_dtype()
    if not isinstance(value, torch.dtype) or not _is_floating(value):
        raise TypeError(
            f"{name} must be a floating dtype of 16 bits or more, got {_describe(value)}"
        )
    return value


def check_integers(name: str, value: object, *, axes: str) -> Tensor:
    """Return ``value`` as an int64 tensor with the given axes, since small integers overflow; lists are converted."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        try:
            value = torch.tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name} must hold integers, got {value!r}") from error
    tensor = check_tensor(name, value, axes=axes)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must have an integer dtype, got {tensor.dtype}")
    return tensor.long()


def check_head_dim(embed_dim: object, num_heads: object) -> int:
    """Return the width of one head, ``embed_dim / num_heads``."""
    width = check_int("embed_dim", embed_dim, minimum=1)
    heads = check_int("num_heads", num_heads, minimum=1)
    if width % heads:
        raise ValueError(
            f"embed_dim must be divisible by num_heads, so that head_dim is whole, "
            f"got embed_dim={width} and num_heads={heads}"
        )
    return width // heads


def check_split(x: object, head_dim: object) -> None:
    """Check the arguments of ``split_heads``."""
    tensor = check_tensor("x", x, axes="batch sequence embed_dim")
    width = check_int("head_dim", head_dim, minimum=1)
    if tensor.shape[-1] % width:
        raise ValueError(
            f"head_dim must divide the last axis of x, got head_dim={width} and x {_shape(tensor)}"
        )


def check_query_offset(query_offset: object, query_length: int, key_length: int) -> int | Tensor:
    """Return the offset of the queries; without one, the lengths must be equal and it is 0."""
    if query_offset is None:
        if query_length != key_length:
            raise ValueError(
                f"query_offset must be given when query and key lengths differ, got {query_length} and {key_length}: "
                f"write query_offset=0 if both start at the same position, "
                f"query_offset={key_length - query_length} if both end at the same position"
            )
        return 0
    if isinstance(query_offset, Tensor):
        return check_integers("query_offset", query_offset, axes="batch")
    return _as_int("query_offset", query_offset, "an int or an integer tensor of shape (batch,)")


def check_lengths(lengths: object, max_length: object, side: object) -> Tensor:
    """Check the arguments of ``padding_mask`` and return the lengths as a tensor."""
    longest = check_int("max_length", max_length, minimum=0)
    tensor = check_integers("lengths", lengths, axes="batch")
    if not isinstance(side, str) or side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', got {side!r}")
    known = tensor.numel() > 0 and not tensor.is_meta and not torch.compiler.is_compiling()
    if known and not bool(((tensor >= 0) & (tensor <= longest)).all()):
        raise ValueError(
            f"lengths must lie between 0 and max_length={longest}, got {tensor.tolist()}"
        )
    return tensor


def check_attention(
    query: object,
    key: object,
    value: object,
    *,
    mask: object,
    bias: object,
    scale: object,
    softcap: object,
    sinks: object,
    dropout_p: object,
) -> None:
    """Check the arguments that every attention function takes."""
    q = check_floating("query", check_tensor("query", query, axes="batch heads query head_dim"))
    k = check_floating("key", check_tensor("key", key, axes="batch heads key head_dim"))
    v = check_floating("value", check_tensor("value", value, axes="batch heads key value_dim"))
    _check_same("dtype", q.dtype, key=k.dtype, value=v.dtype)
    _check_sources(q, k, v)
    if q.shape[-1] == 0:
        raise ValueError(f"query must have a head_dim of at least 1, got {_shape(q)}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"key must have the head_dim of query, {q.shape[-1]}, got {k.shape[-1]}")
    if v.shape[1] != k.shape[1]:
        raise ValueError(f"value must have as many heads as key, {k.shape[1]}, got {v.shape[1]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"query heads must be a multiple of key heads, got {q.shape[1]} and {k.shape[1]}"
        )
    _check_scores(mask, bias, q, k, num_heads=q.shape[1])
    if scale is not None:
        check_real("scale", scale)
    if softcap is not None and check_real("softcap", softcap) <= 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if sinks is not None:
        sink = check_floating("sinks", check_tensor("sinks", sinks, axes="heads"))
        if sink.shape[0] != q.shape[1]:
            raise ValueError(
                f"sinks must hold one number for each of the {q.shape[1]} query heads, got {_shape(sink)}"
            )
        _check_same("device", q.device, sinks=sink.device)
    if not 0 <= check_real("dropout_p", dropout_p) <= 1:
        raise ValueError(f"dropout_p must lie between 0 and 1, got {dropout_p}")


def check_inputs(
    query: object,
    key: object,
    value: object,
    *,
    mask: object,
    bias: object,
    return_weights: object,
    embed_dim: int,
    num_heads: int,
    parameter: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the inputs of a module: a missing key is the query (self-attention), a missing value is the key.

    ``parameter`` is any of the module's own: inputs must have its device and dtype.
    """
    check_bool("return_weights", return_weights)
    if key is None and value is not None:
        raise ValueError("key must be given when value is given, got None")
    key = query if key is None else key
    value = key if value is None else value
    q = check_tensor("query", query, axes="batch query embed_dim")
    k = check_tensor("key", key, axes="batch key embed_dim")
    v = check_tensor("value", value, axes="batch key embed_dim")
    for name, tensor in (("query", q), ("key", k), ("value", v)):
        check_floating(name, tensor)
        if tensor.shape[-1] != embed_dim:
            raise ValueError(
                f"{name} must have a last axis of embed_dim={embed_dim}, got {_shape(tensor)}"
            )
    _check_sources(q, k, v)
    if not _autocasts(q.device):
        _check_same("dtype", q.dtype, key=k.dtype, value=v.dtype)
        if parameter.is_floating_point():
            _check_same("dtype", parameter.dtype, owner="the module", query=q.dtype)
    _check_same("device", parameter.device, owner="the module", query=q.device)
    _check_scores(mask, bias, q, k, num_heads=num_heads)
    return q, k, v


def check_same_names(method: str, *states: dict[str, Tensor]) -> None:
    """Check that the projections to be converted all have a bias, or none of them."""
    if any(state.keys() != states[0].keys() for state in states):
        raise ValueError(
            f"{method} needs a bias in every projection, out_proj included, or in none, got a mixture"
        )


def check_plot(
    weights: object, query_tokens: object, key_tokens: object, titles: object, columns: object
) -> None:
    """Check the arguments of ``plot_attention``."""
    weights = check_floating("weights", _dense("weights", weights))
    if weights.is_meta:
        raise ValueError("weights must hold numbers to be drawn, got a tensor on device meta")
    if weights.ndim not in (2, 3):
        advice = "for one sample of a batch write weights[0]" if weights.ndim == 4 else ""
        raise ValueError(
            f"weights must have shape (query, key) or (heads, query, key), got {_shape(weights)}"
            + _advice(advice)
        )
    if weights.numel() == 0:
        raise ValueError(f"weights must not be empty, got {_shape(weights)}")
    if not bool(((weights > -PLOT_SLACK) & (weights < 1 + PLOT_SLACK)).all()):
        low, high = weights.min().item(), weights.max().item()
        raise ValueError(f"weights must lie between 0 and 1, got {low:.3g} .. {high:.3g}")
    _check_labels("query_tokens", query_tokens, weights.shape[-2])
    _check_labels("key_tokens", key_tokens, weights.shape[-1])
    if titles is not None:
        _check_labels("titles", titles, weights.shape[0] if weights.ndim == 3 else 1)
    check_int("columns", columns, minimum=1)


def _as_int(name: str, value: object, expected: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, Integral)):
        raise TypeError(f"{name} must be {expected}, got {_describe(value)}")
    # A size stays symbolic while torch traces only as long as nothing converts it.
    return value if isinstance(value, (int, torch.SymInt)) else int(value)  # type: ignore[return-value]


def _dense(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {_describe(value)}")
    if value.is_nested or value.layout != torch.strided:
        raise ValueError(
            f"{name} must be a dense tensor, got {'a nested one' if value.is_nested else value.layout}"
        )
    return value


def _autocasts(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _is_floating(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1


def _check_labels(name: str, labels: object, count: int) -> None:
    if isinstance(labels, str) or not isinstance(labels, Sequence):
        raise TypeError(f"{name} must be a sequence of strings, got {_describe(labels)}")
    for label in labels:
        if not isinstance(label, str):
            raise TypeError(
                f"{name} must be a sequence of strings, got a list with {_describe(label)}"
            )
    if len(labels) != count:
        raise ValueError(f"{name} must hold {count} strings to fit weights, got {len(labels)}")


def _check_sources(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Check what query, key and value agree on, with heads and without."""
    _check_same("device", query.device, key=key.device, value=value.device)
    _check_same("batch", query.shape[0], key=key.shape[0], value=value.shape[0])
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"value must be as long as key, {key.shape[-2]}, got {value.shape[-2]}")


def _check_scores(
    mask: object, bias: object, query: Tensor, key: Tensor, *, num_heads: int
) -> None:
    """Check that what is applied to the scores fits them."""
    batch, queries, keys = query.shape[0], query.shape[-2], key.shape[-2]
    scores = {"batch": batch, "heads": num_heads, "query": queries, "key": keys}
    _check_mask(mask, scores, query.device)
    _check_bias(bias, scores, query.device)


def _check_mask(mask: object, scores: dict[str, int], device: torch.device) -> None:
    """Check that ``mask`` is boolean and broadcasts to the scores."""
    if mask is None:
        return
    tensor = _dense("mask", mask)
    if tensor.dtype != torch.bool:
        raise TypeError(
            f"mask must be boolean, True where attention is allowed, got {tensor.dtype}; "
            f"numbers to be added to the scores go in bias"
        )
    _check_broadcast("mask", tensor, scores)
    _check_same("device", device, mask=tensor.device)


def _check_bias(bias: object, scores: dict[str, int], device: torch.device) -> None:
    """Check that ``bias`` holds floating numbers and broadcasts to the scores."""
    if bias is None:
        return
    tensor = _dense("bias", bias)
    if tensor.dtype == torch.bool:
        raise TypeError(
            f"bias must have a floating dtype, got {tensor.dtype}; a boolean mask, True where attention is allowed, "
            f"goes in mask"
        )
    check_floating("bias", tensor)
    _check_broadcast("bias", tensor, scores)
    _check_same("device", device, bias=tensor.device)


def _check_same(what: str, expected: object, *, owner: str = "query", **found: object) -> None:
    for name, value in found.items():
        if value != expected:
            raise ValueError(f"{name} must have the {what} of {owner}, {expected}, got {value}")


def _check_broadcast(name: str, tensor: Tensor, scores: dict[str, int]) -> None:
    sizes = tuple(scores.values())
    shape = tuple(tensor.shape)
    fits = len(shape) <= len(sizes) and all(
        have == 1 or have == want
        for have, want in zip(shape[::-1], sizes[::-1][: len(shape)], strict=True)
    )
    if fits:
        return
    batch, _, queries, keys = sizes
    advice = ""
    if shape == (batch, keys):
        advice = f"for a padding {name} write {name}[:, None, None, :]"
    elif shape == (batch, queries, keys):
        advice = f"for one {name} a sample write {name}[:, None]"
    wanted = ", ".join(f"{axis}={size}" for axis, size in scores.items())
    raise ValueError(f"{name} must broadcast to ({wanted}), got {shape}" + _advice(advice))


def _advice(text: str) -> str:
    return f"; {text}" if text else ""


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _describe(value: object) -> str:
    shown = isinstance(value, (int, float, str, torch.dtype))
    return f"{type(value).__name__} {value!r}" if shown else type(value).__name__

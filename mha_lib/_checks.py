"""Argument checks: plain code with no attention in it, and the only code of the library the book does not show.

Every message names the argument, says what was expected and what came. Types to test for stand in tuples, since torch
2.6 cannot trace ``isinstance(x, A | B)``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from numbers import Integral, Rational, Real
from typing import Any

import torch
from torch import Tensor, nn

_CACHE_FACTS = ("dtype", "device", "batch", "heads", "head_dim", "length")

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_ROPE_ELSEWHERE = (
    *("alibi", "rotary_dim", "rope_pct", "qk_rope_head_dim"),
    *("global_rope_theta", "local_rope_theta", "rope_local_base_freq"),
)
_ROPE_NUMBERS = {"default": (), "linear": ("factor",), "llama3": _LLAMA3}

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
    is_fraction = isinstance(value, Rational) and not isinstance(value, Integral)
    if isinstance(value, bool) or is_fraction or not isinstance(value, Real):
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


def check_device(name: str, value: object) -> None:
    """Check that ``value`` names a device of a kind that torch knows, or is None."""
    if value is None or isinstance(value, torch.device):
        return
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a torch.device or its name, got {_describe(value)}")
    try:
        torch.device(value)
    except RuntimeError as error:
        raise ValueError(
            f"{name} must name a device such as 'cpu' or 'cuda:0', got {value!r}"
        ) from error


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
    check_scores(mask, bias, sinks, q, k, v)
    check_numbers(scale=scale, softcap=softcap, dropout_p=dropout_p)


def check_scores(
    mask: object,
    bias: object,
    sinks: object,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    past: int = 0,
) -> None:
    """Check that what is applied to the scores fits the heads; ``past`` keys are cached before those given."""
    _check_same("dtype", query.dtype, key=key.dtype, value=value.dtype)
    heads = query.shape[1]
    _check_scores(mask, bias, query, key, num_heads=heads, past=past)
    if sinks is not None:
        sink = check_floating("sinks", check_tensor("sinks", sinks, axes="heads"))
        if sink.shape[0] != heads:
            raise ValueError(
                f"sinks must hold one number for each of the {heads} query heads, got {_shape(sink)}"
            )
        _check_same("device", query.device, sinks=sink.device)


def check_numbers(*, scale: object, softcap: object, **probability: object) -> None:
    """Check the numbers that attention takes; dropout goes by two names."""
    if scale is not None:
        check_real("scale", scale)
    if softcap is not None and check_real("softcap", softcap) <= 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    for name, value in probability.items():
        if not 0 <= check_real(name, value) <= 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {value}")


def check_positions(
    query: Tensor, key: Tensor, *, causal: object, window: object, query_offset: object
) -> int | Tensor:
    """Return the offset of the queries; without ``causal`` and ``window`` it has no meaning and is 0."""
    positional = check_bool("causal", causal)
    if window is not None:
        positional = bool(check_int("window", window, minimum=1))
    lengths = (query.shape[2], key.shape[2]) if positional else (0, 0)
    offset = check_query_offset(query_offset, *lengths)
    if isinstance(offset, Tensor):
        _check_same("device", query.device, query_offset=offset.device)
        _check_same("batch", query.shape[0], query_offset=offset.shape[0])
    return offset if positional else 0


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Check that ``value`` is one of the words."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, choices))}, got {_describe(value)}"
        )


def check_frequencies(dim: object, base: object, frequencies: object) -> tuple[int, float]:
    """Check the numbers of ``RotaryEmbedding``; return the features to turn and the base."""
    width = check_int("dim", dim, minimum=2)
    if width % 2:
        raise ValueError(f"dim must be even, since features turn in pairs, got {width}")
    number = check_real("base", base)
    if number <= 0:
        raise ValueError(f"base must be positive, got {number}")
    if frequencies is not None:
        tensor = check_floating(
            "frequencies", check_tensor("frequencies", frequencies, axes="dim/2")
        )
        if tensor.shape[0] != width // 2:
            raise ValueError(
                f"frequencies must hold dim/2={width // 2} numbers for dim={width}, got {_shape(tensor)}"
            )
        if tensor.is_meta or not bool(tensor.isfinite().all()):
            got = "a tensor on device meta" if tensor.is_meta else tensor.tolist()
            raise ValueError(f"frequencies must be finite numbers, got {got}")
    return width, number


def check_rotary(x: object, offset: object, dim: int) -> int | Tensor:
    """Check the inputs of ``RotaryEmbedding`` and return the offset."""
    tensor = check_floating("x", check_tensor("x", x, axes="batch heads sequence head_dim"))
    if tensor.shape[-1] < dim:
        raise ValueError(f"x must have a head_dim of at least dim={dim}, got {_shape(tensor)}")
    if not isinstance(offset, Tensor):
        return _as_int("offset", offset, "an int or an integer tensor of shape (batch,)")
    positions = check_integers("offset", offset, axes="batch")
    _check_same("device", tensor.device, owner="x", offset=positions.device)
    _check_same("batch", tensor.shape[0], owner="x", offset=positions.shape[0])
    return positions


def check_append(key: object, value: object, keys: Tensor, length: int) -> None:
    """Check that tokens fit into a cache that holds ``keys``, of which ``length`` are taken."""
    batch, heads, max_length, head_dim = keys.shape
    tensors = [
        check_tensor(name, x, axes="batch heads sequence head_dim")
        for name, x in (("key", key), ("value", value))
    ]
    for name, x in zip(("key", "value"), tensors, strict=True):
        found = x.dtype, x.device, x.shape[0], x.shape[1], x.shape[3], x.shape[2]
        expected = keys.dtype, keys.device, batch, heads, head_dim, tensors[0].shape[2]
        if found != expected:
            for what, have, want in zip(_CACHE_FACTS, found, expected, strict=True):
                owner = "key" if what == "length" else "the cache"
                _check_same(what, want, owner=owner, **{name: have})
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} must not require a gradient, since the cache is overwritten in place, got one that does; "
                f"write with torch.no_grad(): around the model"
            )
    if length + tensors[0].shape[2] > max_length:
        raise ValueError(
            f"key must fit into the cache, max_length={max_length}, "
            f"got {tensors[0].shape[2]} tokens after {length}"
        )


def check_sizes(
    embed_dim: object,
    num_heads: object,
    num_kv_heads: object,
    head_dim: object,
    kdim: object,
    vdim: object,
) -> tuple[int, int, int, int, int, int]:
    """Return the sizes of ``MultiHeadAttention`` in this order, defaults filled in."""
    width = check_int("embed_dim", embed_dim, minimum=1)
    heads = check_int("num_heads", num_heads, minimum=1)
    kv_heads = heads if num_kv_heads is None else check_int("num_kv_heads", num_kv_heads, minimum=1)
    if heads % kv_heads:
        raise ValueError(
            f"num_kv_heads must divide num_heads={heads}, so that query heads form groups, got {kv_heads}"
        )
    dim = (
        check_head_dim(width, heads)
        if head_dim is None
        else check_int("head_dim", head_dim, minimum=1)
    )
    key_width = width if kdim is None else check_int("kdim", kdim, minimum=1)
    value_width = width if vdim is None else check_int("vdim", vdim, minimum=1)
    return width, heads, kv_heads, dim, key_width, value_width


def check_callable(name: str, value: object, example: str) -> None:
    """Check that ``value`` can be called and is not a module made already, or is None."""
    if value is not None and (not callable(value) or isinstance(value, nn.Module)):
        raise TypeError(f"{name} must be callable, such as {example}, got {_describe(value)}")


def check_rotary_module(rotary: Any, head_dim: int) -> Any:
    """Return ``rotary`` if it can be called and does not turn more features than a head has."""
    if rotary is not None and (not callable(rotary) or isinstance(rotary, type)):
        raise TypeError(
            f"rotary must be a module such as RotaryEmbedding(head_dim), got {_describe(rotary)}"
            + (f" {rotary.__name__}" if isinstance(rotary, type) else "")
        )
    dim = getattr(rotary, "dim", None)
    if isinstance(dim, int) and dim > head_dim:
        raise ValueError(f"rotary must turn at most head_dim={head_dim} features, got dim={dim}")
    return rotary


def check_norm(norm: object) -> nn.Module:
    """Return what ``qk_norm`` made, if it is a module."""
    if not isinstance(norm, nn.Module):
        raise TypeError(
            f"qk_norm must make a module, such as torch.nn.RMSNorm, got {_describe(norm)}"
        )
    return norm


def check_cache(cache: Any) -> int:
    """Return how many tokens a cache holds, 0 without one."""
    if cache is None:
        return 0
    if not callable(getattr(cache, "append", None)) or not hasattr(cache, "length"):
        raise TypeError(f"cache must be a KVCache, got {_describe(cache)}")
    return cache.length  # type: ignore[no-any-return]


def check_diagnosis(
    candidate: object, embed_dim: object, num_heads: object, **options: Any
) -> dict[str, Any]:
    """Check the arguments of ``diagnose`` and return them, all but the candidate, with plain numbers."""
    if not callable(candidate):
        raise TypeError(f"candidate must be a module or a function, got {_describe(candidate)}")
    if isinstance(candidate, type):
        raise TypeError(
            f"candidate must be a module or a function, got the class {candidate.__name__}"
        )
    options["embed_dim"] = check_int("embed_dim", embed_dim, minimum=1)
    heads = options["num_heads"] = check_int("num_heads", num_heads, minimum=1)
    for name in ("num_kv_heads", "window"):
        if options[name] is not None:
            options[name] = check_int(name, options[name], minimum=1)
    if options["num_kv_heads"] and heads % options["num_kv_heads"]:
        raise ValueError(
            f"num_kv_heads must divide num_heads={heads}, got {options['num_kv_heads']} key/value heads"
        )
    for name in ("causal", "takes_mask"):
        check_bool(name, options[name])
    check_numbers(scale=options["scale"], softcap=options["softcap"])
    for name in ("scale", "softcap"):
        if options[name] is not None:
            options[name] = float(options[name])
    check_rotary_module(options["rotary"], sys.maxsize)
    check_callable("qk_norm", options["qk_norm"], "nn.RMSNorm")
    weights = options["weights"]
    if isinstance(weights, str) and weights != "auto":
        raise ValueError(f"weights must be 'auto', a dict of matrices or None, got {weights!r}")
    if not (weights is None or isinstance(weights, (str, Mapping))):
        raise TypeError(
            f"weights must be 'auto', a dict of matrices or None, got {_describe(weights)}"
        )
    return options


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
    parameter: object,
    kdim: int | None = None,
    vdim: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the inputs of a module: a missing key is the query (self-attention), a missing value is the key.

    ``parameter`` is any of the module's own, if it has one: inputs must have its device and dtype.
    """
    parameter = parameter if isinstance(parameter, Tensor) else None
    if parameter is not None and parameter.is_meta and not getattr(query, "is_meta", True):
        parameter = None  # weights that a hook will fetch
    check_bool("return_weights", return_weights)
    if key is None and value is not None:
        raise ValueError("key must be given when value is given, got None")
    key = query if key is None else key
    value = key if value is None else value
    key_width, value_width = kdim or embed_dim, vdim or embed_dim
    q = _check_tokens("query", query, "query", "embed_dim", embed_dim)
    k, v = q, q
    if key is not query or key_width != embed_dim:
        k = _check_tokens("key", key, "key", "kdim" if kdim else "embed_dim", key_width)
    if value is not query or value_width != embed_dim:
        v = _check_tokens("value", value, "key", "vdim" if vdim else "embed_dim", value_width)
    if k is not q or v is not q:
        _check_sources(q, k, v)
    if not _autocasts(q.device):
        _check_same("dtype", q.dtype, key=k.dtype, value=v.dtype)
        if parameter is not None and _is_floating(parameter.dtype):
            _check_same("dtype", parameter.dtype, owner="the module", query=q.dtype)
    if parameter is not None:
        _check_same("device", parameter.device, owner="the module", query=q.device)
    _check_scores(mask, bias, q, k, num_heads=num_heads)
    return q, k, v


def _check_tokens(name: str, value: object, axis: str, what: str, width: int) -> Tensor:
    """Return the tokens if they are as wide as a projection takes them."""
    tensor = check_floating(name, check_tensor(name, value, axes=f"batch {axis} embed_dim"))
    if tensor.shape[-1] != width:
        raise ValueError(f"{name} must have a last axis of {what}={width}, got {_shape(tensor)}")
    return tensor


def check_same_names(method: str, *states: dict[str, Tensor]) -> None:
    """Check that the projections to be converted all have a bias, or none of them."""
    if any(state.keys() != states[0].keys() for state in states):
        raise ValueError(
            f"{method} needs a bias in every projection, out_proj included, or in none, got a mixture"
        )


def check_type(name: str, value: object, expected: type) -> None:
    """Check that ``value`` is of a class."""
    if not isinstance(value, expected):
        raise TypeError(f"{name} must be a {expected.__name__}, got {_describe(value)}")


def check_plain(name: str, **options: bool) -> None:
    """Check that none of the options that cannot be converted is in use."""
    used = [option for option, is_used in options.items() if is_used]
    if used:
        raise ValueError(
            f"{name} must not use what has no counterpart, got one with {', '.join(used)}"
        )


def check_source(source: Any, prefix: object, layers: list[str]) -> tuple[dict[str, Tensor], str]:
    """Return what stands under a prefix, without it, and the prefix with its dot.

    ``layers`` are names of layers that should stand there; where they stand instead is part of the message.
    """
    if not isinstance(prefix, str):
        raise TypeError(f"prefix must be a string, got {_describe(prefix)}")
    if isinstance(source, type) or not isinstance(source, (nn.Module, Mapping)):
        raise TypeError(f"source must be a module or a state dict, got {_describe(source)}")
    state = source.state_dict() if isinstance(source, nn.Module) else source
    for key in state:
        if not isinstance(key, str):
            raise TypeError(f"source must have strings as keys, got {_describe(key)}")
    prefix = prefix.removesuffix(".") + "." if prefix else ""
    under = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
    begun = bool(prefix) and any(key.startswith(f"{layer}.") for key in under for layer in layers)
    if not begun and not any(f"{layer}.weight" in under for layer in layers):
        ends = tuple(f"{layer}.weight" for layer in layers)
        fit = [key.removesuffix(end) for key in state for end in ends if _ends(key, end)]
        keys = list(under) or list(state)
        raise ValueError(
            f"source must have the key {' or '.join(prefix + end for end in ends)}"
            + (f"; prefix={fit[0]!r} would fit" if fit else f", got {_some(keys)}")
        )
    return under, prefix


def check_keys(
    state: Mapping[str, Any],
    prefix: str,
    layers: list[str],
    biased: list[str],
    beside: Sequence[str],
) -> None:
    """Check that layers have their weights and biases, and that nothing else stands beside them.

    Layers that need not have a bias have one all together or not at all, but for the last.
    """
    wanted = [f"{layer}.weight" for layer in layers] + [f"{layer}.bias" for layer in biased]
    inner = [f"{layer}.bias" for layer in layers[:-1]]
    if any(key in state for key in inner):
        wanted += [key for key in inner if key not in wanted]
    missing = [prefix + key for key in wanted if key not in state]
    allowed = {*wanted, *beside, f"{layers[-1]}.bias"}
    left = [prefix + key for key in state if key not in allowed]
    if missing or left:
        found = [f"missing {_some(missing)}"] * bool(missing) + [f"extra {_some(left)}"] * bool(
            left
        )
        raise ValueError(
            f"source must have exactly the keys of one attention under prefix={prefix!r}, "
            f"got {' and '.join(found)}"
        )


def check_matrix(key: str, value: object, kind: str) -> Tensor:
    """Return a weight with two axes, or a bias with one, if it holds floating numbers."""
    axes = "rows columns" if kind == "weight" else "rows"
    return check_floating(key, check_tensor(key, value, axes=axes))


def check_thirds(key: str, rows: Tensor) -> Tensor:
    """Return the packed rows if they can be cut in three."""
    if rows.shape[0] % 3:
        raise ValueError(
            f"{key} must hold queries, keys and values, a multiple of 3 rows, got {rows.shape[0]}"
        )
    return rows


def check_packed(key: str, weight: Tensor) -> None:
    """Check that a packed weight has its columns as ``Conv1D`` keeps them, not its rows as ``nn.Linear`` does."""
    rows, columns = weight.shape
    if rows == 3 * columns:
        raise ValueError(
            f"{key} must have shape (embed_dim, 3 * embed_dim), stored as transformers' Conv1D does, got "
            f"{_shape(weight)}"
            + _advice("for matrices of nn.Linear transpose it and c_proj.weight")
        )


def check_torch_keys(names: Sequence[str], packed: bool) -> None:
    """Check that the tensors of torch's module are the plain ones; parametrized and pruned ones have others."""
    inputs = ["in_proj_weight"] if packed else [f"{part}_proj_weight" for part in "qkv"]
    plain, biases = [*inputs, "out_proj.weight"], ["in_proj_bias", "out_proj.bias"]
    if sorted(names) not in (sorted(plain), sorted(plain + biases)):
        raise ValueError(
            f"module must have exactly the tensors {_some(plain)}, with both biases or without, got {_some(names)}"
        )


def check_parts(strangers: Sequence[str]) -> None:
    """Check that an attention module has no parts besides those that are known."""
    if strangers:
        raise ValueError(
            f"source must have no parts but the layers of its attention and dropout, got {_some(strangers)}"
        )


def check_causal(causal: bool) -> None:
    """Check that a source that is always causal here is so there."""
    if not causal:
        raise ValueError("source must be causal, got one whose config has is_causal=False")


def check_same_size(name: str, expected: int, found: int | None) -> None:
    """Check that what a source says of a size is what its weights say."""
    if found is not None and found != expected:
        raise ValueError(
            f"source must have {name}={found}, as it says itself, got weights that make it {expected}"
        )


def check_layers(
    state: Mapping[str, tuple[str, Tensor]], num_heads: object, kdim: int | None, vdim: int | None
) -> dict[str, int]:
    """Return the sizes of ``MultiHeadAttention`` that weights tell, if they all fit together."""
    heads = check_int("num_heads", num_heads, minimum=1)
    (first, q), (_, k) = (state[f"{part}_proj.weight"] for part in "qk")
    inner, width = q.shape
    if inner % heads or not inner:
        raise ValueError(f"num_heads must divide the {inner} rows of {first}, got {heads}")
    head_dim = inner // heads
    kv_heads = k.shape[0] // head_dim
    if not kv_heads or k.shape[0] % head_dim or heads % kv_heads:
        raise ValueError(
            f"{state['k_proj.weight'][0]} must have a number of heads of head_dim={head_dim} rows that divides "
            f"num_heads={heads}, got shape {_shape(k)}"
        )
    rows = {"q": inner, "k": k.shape[0], "v": k.shape[0], "out": width}
    columns = {"q": width, "k": kdim or width, "v": vdim or width, "out": inner}
    for part, count in rows.items():
        for kind, shape in {"weight": (count, columns[part]), "bias": (count,)}.items():
            key, tensor = state.get(f"{part}_proj.{kind}", (first, None))
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{key} must give {part}_proj.{kind} the shape {shape}, got {_shape(tensor)}"
                )
            _check_same("dtype", q.dtype, owner=first, **{key: tensor.dtype})
            _check_same("device", q.device, owner=first, **{key: tensor.device})
    return {
        "embed_dim": width,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "kdim": columns["k"],
        "vdim": columns["v"],
    }


def check_heads(given: object, known: int | None) -> int:
    """Return the number of heads that the caller gives, or the one that the source tells."""
    if given is None and known is None:
        raise ValueError("num_heads must be given, since the source does not tell it, got None")
    if given is None:
        return int(known)  # type: ignore[arg-type]
    heads = check_int("num_heads", given, minimum=1)
    if known is not None and heads != known:
        raise ValueError(f"num_heads must be {known}, as the source has it, got {heads}")
    return heads


def check_known(kind: str, config: Any, types: Sequence[str]) -> None:
    """Check that a module, by the type of its model or else its own, is one whose attention is known."""
    if kind not in types:
        raise ValueError(
            f"source must be of type {', '.join(types)}, got {kind}; "
            f"if its attention is the same function, give its state_dict() and num_heads"
        )
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    if positions != "absolute":
        raise ValueError(
            f"source must have absolute positions, got position_embedding_type={positions}"
        )


def check_rotary_given(rotary: Any, config: Any) -> None:
    """Check that rotary positions are given or can be told."""
    if rotary is None and config is None:
        raise ValueError(
            "rotary must be given, since the source does not tell it, got None; "
            "for the config of a model write rotary_from_config(config)"
        )


def check_config(config: Any) -> tuple[int, dict[str, Any]]:
    """Return the head dimension and what a config says of rotary positions, base and part filled in."""
    if config is None or isinstance(config, (str, int, float, list, tuple, type)):
        raise TypeError(f"config must be a config or a mapping, got {_describe(config)}")
    entries = config if isinstance(config, Mapping) else vars(config)
    foreign = [name for name in _ROPE_ELSEWHERE if entries.get(name)]
    if foreign:
        raise ValueError(
            f"config must describe its rotary positions by rope_theta, got {_some(foreign)}"
        )
    positions = entries.get("position_embedding_type") or "rotary"
    if positions not in ("rotary", "rope"):
        raise ValueError(
            f"config must have rotary positions, got position_embedding_type={positions!r}"
        )
    rope = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    for name, other in {
        "rope_theta": "rotary_emb_base",
        "partial_rotary_factor": "rotary_pct",
    }.items():
        rope[name] = next(
            (entries[x] for x in (name, other) if entries.get(x) is not None), rope[name]
        )
    for name in ("rope_scaling", "rope_parameters"):
        scaling = entries.get(name) or {}
        if not isinstance(scaling, Mapping):
            raise TypeError(f"{name} must be a mapping, got {_describe(scaling)}")
        rope |= scaling
    for name in ("rope_theta", "partial_rotary_factor"):
        rope[name] = check_real(name, rope[name])
    if not 0 < rope["partial_rotary_factor"] <= 1:
        part = rope["partial_rotary_factor"]
        raise ValueError(f"partial_rotary_factor must be above 0 and at most 1, got {part}")
    head_dim = entries.get("head_dim")
    if head_dim is None:
        sizes = [entries.get(name) for name in ("hidden_size", "num_attention_heads")]
        if None in sizes:
            raise ValueError(
                "config must have head_dim, or hidden_size and num_attention_heads, "
                f"got {_some(list(entries))}"
            )
        head_dim = check_head_dim(*sizes)
    return check_int("head_dim", head_dim, minimum=1), rope


def check_rope(rope: dict[str, Any]) -> tuple[str, float, float, float, float]:
    """Return the type of a scaling and its four numbers, where it has them; unknown ones are refused."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in _ROPE_NUMBERS:
        raise ValueError(f"rope_type must be {', '.join(_ROPE_NUMBERS)}, got {kind!r}")
    unknown = [
        name
        for name, value in rope.items()
        if value is not None and name not in ("rope_type", "type", *_LLAMA3)
    ]
    missing = [name for name in _ROPE_NUMBERS[kind] if rope.get(name) is None]
    if missing or unknown:
        what = f"without {_some(missing)}" if missing else f"with {_some(unknown)}"
        raise ValueError(f"config must scale by what rope_type {kind!r} needs, got one {what}")
    numbers = (rope.get(name) if name in _ROPE_NUMBERS[kind] else 1.0 for name in _LLAMA3)
    factor, low, high, length = map(check_real, _LLAMA3, numbers)
    if factor <= 0:
        raise ValueError(f"factor must be positive, got {factor}")
    if kind == "llama3" and low >= high:
        raise ValueError(f"low_freq_factor must be below high_freq_factor={high}, got {low}")
    return kind, factor, low, high, length


def check_permutation(rows: object, head_dim: object, rotary_dim: object) -> int:
    """Return how many features of each head turn, if the rows are those of whole heads."""
    tensor = _dense("rows", rows)
    width = check_int("head_dim", head_dim, minimum=1)
    if tensor.ndim not in (1, 2) or tensor.shape[0] % width:
        raise ValueError(
            f"rows must have shape (heads * head_dim, ...) with head_dim={width}, got {_shape(tensor)}"
        )
    turning = width if rotary_dim is None else check_int("rotary_dim", rotary_dim, minimum=2)
    if turning > width or turning % 2:
        name = "head_dim" if rotary_dim is None else "rotary_dim"
        raise ValueError(f"{name} must be even and at most head_dim={width}, got {turning}")
    return turning


def check_name(name: object, registered: Mapping[str, Any], function: object) -> None:
    """Check that ``name`` can be registered, or is so already for the same function."""
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {_describe(name)}")
    taken = name == "eager" or registered.get(name, function) is not function
    if not name or taken or "flash" in name or {"|", "/"} & set(name):
        raise ValueError(f"name must be a free name of an attention implementation, got {name!r}")


def _ends(key: str, end: str) -> bool:
    return key == end or key.endswith("." + end)


def _some(names: Sequence[str]) -> str:
    """At most four names of a list."""
    shown = ", ".join(map(repr, names[:4]))
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown or "nothing"


def check_plot(
    weights: object, query_tokens: object, key_tokens: object, titles: object, columns: object
) -> None:
    """Check the arguments of ``plot_attention``."""
    weights = _check_drawn(weights)
    if weights.ndim not in (2, 3):
        advice = "for one sample of a batch write weights[0]" if weights.ndim == 4 else ""
        raise ValueError(
            f"weights must have shape (query, key) or (heads, query, key), got {_shape(weights)}"
            + _advice(advice)
        )
    _check_labels("query_tokens", query_tokens, weights.shape[-2])
    _check_labels("key_tokens", key_tokens, weights.shape[-1])
    if titles is not None:
        _check_labels("titles", titles, weights.shape[0] if weights.ndim == 3 else 1)
    check_int("columns", columns, minimum=1)


def check_explored(weights: object, tokens: object, key_tokens: object, caption: object) -> Tensor:
    """Check the arguments of ``explore_attention``; return the weights as ``(layers, h, i, j)`` on the CPU."""
    if isinstance(weights, (list, tuple)):
        layers = [_dense(f"weights[{at}]", layer) for at, layer in enumerate(weights)]
        if len({layer.shape for layer in layers}) != 1 or layers[0].ndim != 3:
            shapes = ", ".join(_shape(layer) for layer in layers)
            raise ValueError(
                f"weights must hold one tensor (heads, query, key) a layer, all of one shape, got [{shapes}]"
                + _advice("for one sample of a batch write [layer[0] for layer in weights]")
            )
        weights = torch.stack([layer.detach().cpu() for layer in layers])
    weights = _check_drawn(weights)
    if weights.ndim not in (2, 3, 4):
        raise ValueError(
            "weights must have shape (query, key), (heads, query, key) or (layers, heads, query, key), "
            f"got {_shape(weights)}"
        )
    _check_labels("tokens", tokens, weights.shape[-2])
    _check_labels("key_tokens", key_tokens, weights.shape[-1])
    if not isinstance(caption, str):
        raise TypeError(f"caption must be a string, got {_describe(caption)}")
    weights = weights.detach().cpu().clamp(0, 1)
    return weights[(None,) * (4 - weights.ndim)]


def check_index(name: str, value: object, size: int) -> int:
    """Check that ``value`` counts one of ``size`` things, from 0."""
    index = check_int(name, value, minimum=0)
    if index >= size:
        raise ValueError(f"{name} must be below {size}, got {index}")
    return int(index)


def _check_drawn(weights: object) -> Tensor:
    weights = check_floating("weights", _dense("weights", weights))
    if weights.is_meta:
        raise ValueError("weights must hold numbers to be drawn, got a tensor on device meta")
    if weights.numel() == 0:
        raise ValueError(f"weights must not be empty, got {_shape(weights)}")
    if not bool(((weights > -PLOT_SLACK) & (weights < 1 + PLOT_SLACK)).all()):
        low, high = weights.min().item(), weights.max().item()
        raise ValueError(f"weights must lie between 0 and 1, got {low:.3g} .. {high:.3g}")
    return weights


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
    mask: object, bias: object, query: Tensor, key: Tensor, *, num_heads: int, past: int = 0
) -> None:
    """Check that what is applied to the scores fits them."""
    if mask is None and bias is None:
        return
    batch, queries, keys = query.shape[0], query.shape[-2], past + key.shape[-2]
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

"""Multi-head attention with known mistakes built in, and the search for those that explain an output.

Built in chapter 4 of the book.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from einops import EinopsError, einsum, rearrange, repeat
from torch import Tensor

from mha_lib.masks import causal_mask, sliding_window_mask
from mha_lib.recognise import Projections

KEPT = 600
"""Results that a probe remembers: those of single mistakes, which come again in pairs."""

SHOWN_FEATURES = 8
"""Output features that the search compares; what it finds is then held against all of them."""


@dataclass(frozen=True)
class Recipe:
    """Multi-head attention as a list of choices; every default is right.

    Attributes:
        layout: Order of the rows of a packed projection.
        roles: Which projection serves as query, key and value; ``x`` is none at all.
        sliced: Whether each head reads its own slice of the tokens only.
        across: ``"tokens"``, or ``"heads"`` if each token attends among its own heads only.
        transposed: Projections (``q``, ``k``, ``v``, ``o``) whose matrix is used the wrong way round.
        sequence_first: Whether attention runs along the batch axis.
        split, merge: Order of the numbers of one sample, in memory, before the split and after the merge.
        keys: Order in which the numbers of one head's keys are read for the scores.
        heads: Number of heads; None for the right one.
        norm: Where queries and keys are normalised: ``"head"``, ``"flat"`` (before the split), ``"none"``, or
            ``"head q"`` and ``"head k"``: one of them only.
        rotated: What is rotated: ``"qk"`` is right.
        rotation: How: ``"layout"`` pairs the features in the other way, ``"axis"`` counts heads as positions.
        groups: Order in which key and value heads are repeated.
        scale: Factor of the scores; None for the right one.
        softcap: Whether the softcap is applied.
        causal, window: Change of the allowed distances; None drops the rule.
        inverted: Whether the causal rule is turned round.
        forced: Whether it is applied although it is not meant.
        alone: Whether each token attends to itself only.
        padding: Which tokens the padding mask hides: ``"keys"`` is right.
        forbid: What becomes of a forbidden score, by the causal rule and by the padding mask: ``"inf"`` is right.
        axis: Axis of the softmax over ``(b, h, i, j)``.
        softmaxes: How many are taken.
        biased: Projections whose bias is added.
        out: Whether the output projection is applied.
    """

    layout: str = "three h d"
    roles: str = "qkv"
    sliced: bool = False
    transposed: str = ""
    sequence_first: bool = False
    across: str = "tokens"
    split: str = "n h d"
    merge: str = "n h d"
    keys: str = "n d"
    heads: int | None = None
    norm: str = "head"
    rotated: str = "qk"
    rotation: str = ""
    groups: tuple[str, str] = ("k g", "k g")
    scale: float | None = None
    softcap: bool = True
    causal: int | None = 0
    inverted: bool = False
    forced: bool = False
    alone: bool = False
    window: int | None = 0
    padding: str = "keys"
    forbid: tuple[str, str] = ("inf", "inf")
    axis: int = -1
    softmaxes: int = 1
    biased: str = "qkvo"
    out: bool = True


class Mistake(NamedTuple):
    """A wrong choice, the name of its finding and what it does to attention; a rare one is not tried in pairs."""

    name: str
    changes: dict[str, Any]
    does: str
    rare: bool = False


class Explanation(NamedTuple):
    """A recipe that gives a candidate's answer, the mistakes in it, the largest difference, and which answer it is."""

    recipe: Recipe
    mistakes: tuple[Mistake, ...]
    error: float
    answer: int = 0


@dataclass
class Probe:
    """Tokens, weights and options on which a candidate and the recipes are compared.

    Attributes:
        x: Tokens, shape ``(b, n, e)``.
        weights: The projections of the candidate.
        num_heads, num_kv_heads: Numbers of heads, ``h`` and ``k``.
        causal, window, scale, softcap: What the candidate is meant to do.
        rotary: The positions that it is meant to have.
        norms: Norms of queries and keys, or None.
        real: True for real tokens, shape ``(b, n)``; None if there is no padding.
        projections, results: What was computed already.
    """

    x: Tensor
    weights: Projections
    num_heads: int
    num_kv_heads: int
    causal: bool = False
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    rotary: Callable[[Tensor], Tensor] | None = None
    norms: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None = None
    real: Tensor | None = None
    projections: dict[object, Tensor] = field(default_factory=dict)
    results: dict[tuple[str, Recipe], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def head_dim(self) -> int:
        """Features of one head, ``d``."""
        return len(self.weights.query) // self.num_heads

    def weights_dim(self, recipe: Recipe) -> int:
        """Features of one head, for the number of heads in a recipe."""
        return len(self.weights.query) // (recipe.heads or self.num_heads)

    def projected(self, role: str, recipe: Recipe) -> Tensor:
        """Queries, keys or values before the split, ``(b, n, h d)``; computed once for each way to read the weights."""
        if role == "x":
            return self.x
        turned = role in recipe.transposed

        def project() -> Tensor:
            weight, bias = self.weights.read(recipe.layout, self.num_heads)[role]
            if recipe.sliced:
                weight = block_diagonal(weight, self.num_heads)
            added = bias if role in recipe.biased else None
            return _linear(self.x, weight.T if turned else weight, added)

        name = (role, recipe.layout, recipe.sliced, turned, role in recipe.biased)
        if name not in self.projections:
            self.projections[name] = project()
        return self.projections[name]

    def remembered(
        self, what: str, recipe: Recipe, compute: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """What was computed for a recipe; only so many results are kept."""
        if (what, recipe) in self.results:
            return self.results[what, recipe]
        result = compute()
        if len(self.results) < KEPT:
            self.results[what, recipe] = result
        return result


BEHIND_SCORES: dict[str, Any] = {
    name: getattr(Recipe(), name)
    for name in (
        *("scale", "softcap", "causal", "inverted", "forced", "alone", "window", "padding"),
        *("forbid", "axis", "softmaxes"),
    )
}
"""The choices that act on the scores, with their right values."""


def block_diagonal(weight: Tensor, num_heads: int) -> Tensor:
    """Keep of each head's rows the columns of its own slice of the input: ``((h d), e)`` to ``((h d), e)``."""
    blocks = rearrange(weight, "(h d) (g c) -> h g d c", h=num_heads, g=num_heads)
    own = rearrange(torch.eye(num_heads).to(weight), "h g -> h g 1 1")
    return rearrange(blocks * own, "h g d c -> (h d) (g c)")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = einsum(x, weight, "b n e, o e -> b n o")
    return product if bias is None else product + bias


def attend_with(recipe: Recipe, probe: Probe, features: int | None = None) -> tuple[Tensor, Tensor]:
    """Multi-head self-attention after a recipe.

    Returns:
        The output, ``(b, n, e)`` or its first ``features``, and ``(b, n)``: True where a query may attend to
        something and is itself no padding, so that its output is defined.
    """
    attended = replace(recipe, merge="n h d", out=True, transposed=recipe.transposed.strip("o"))
    output, rows = probe.remembered("heads", attended, lambda: _attended(attended, probe))
    return _merged(recipe, probe, output, features), rows


def _attended(recipe: Recipe, probe: Probe) -> tuple[Tensor, Tensor]:
    """What the heads give, ``(b, h, n, d)``, and where it is defined, ``(b, n)``."""
    before = replace(recipe, **BEHIND_SCORES)
    products, value = probe.remembered("products", before, lambda: _products(before, probe))
    scales = (recipe.scale, probe.scale, probe.weights_dim(recipe) ** -0.5)
    scores = products * next(each for each in scales if each is not None)
    if probe.softcap is not None and recipe.softcap:
        scores = probe.softcap * torch.tanh(scores / probe.softcap)
    weights, rows = _weights(recipe, probe, scores)
    output = einsum(weights, value, "b h i j, b h j d -> b h i d")
    if recipe.sequence_first:
        rows = rearrange(rows, "n b -> b n")
    if recipe.across == "heads":
        output = rearrange(output, "b n h d -> b h n d")
        rows = torch.ones_like(probe.x[..., 0], dtype=torch.bool)
    return output, rows if probe.real is None else rows & probe.real


def _products(recipe: Recipe, probe: Probe) -> tuple[Tensor, Tensor]:
    """Products of queries and keys, ``(b, h, i, j)``, and the values, ``(b, h, j, d)``."""
    query, key, value = _heads(recipe, probe)
    if recipe.keys == "d n":
        numbers = rearrange(key, "b h n d -> b h (n d)")
        key = rearrange(numbers, "b h (d n) -> b h n d", n=key.shape[2])
    return einsum(query, key, "b h i d, b h j d -> b h i j"), value


def _weights(recipe: Recipe, probe: Probe, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Mask and softmax; and which queries may attend to something, ``(b, i)``."""
    rules = [
        (allowed, how)
        for allowed, how in zip(_allowed(recipe, probe), recipe.forbid, strict=True)
        if allowed is not None
    ]
    allowed_at_all = torch.ones_like(scores[:, 0], dtype=torch.bool)
    for allowed, how in rules:
        if how == "zero":
            scores = scores * allowed
    for allowed, how in rules:
        if how == "inf":
            low = torch.finfo(scores.dtype).min if recipe.padding == "queries" else -torch.inf
            scores = scores.masked_fill(~allowed, low)
            allowed_at_all = allowed_at_all & allowed[:, 0]
    weights = scores.softmax(dim=recipe.axis)
    if recipe.softmaxes != 1:
        weights = weights.softmax(dim=-1) if recipe.softmaxes else scores.nan_to_num(neginf=0.0)
    for allowed, how in rules:
        if how == "after":
            weights = weights * allowed
    return weights, allowed_at_all.any(dim=-1)


def _heads(recipe: Recipe, probe: Probe) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of all heads, each ``(b, h, n, d)``."""
    flat = [probe.projected(role, recipe) for role in recipe.roles]
    if recipe.sequence_first:
        flat = [rearrange(part, "b n e -> n b e") for part in flat]
    heads = recipe.heads or probe.num_heads
    kv_heads = heads if probe.num_kv_heads == probe.num_heads else probe.num_kv_heads
    norms = (*(probe.norms or (None, None)), None)
    split = []
    for name, part, norm, count in zip(
        "qkv", flat, norms, (heads, kv_heads, kv_heads), strict=True
    ):
        where, _, only = recipe.norm.partition(" ")
        if norm is not None and only and only != name:
            norm = None
        if norm is not None and where == "flat":
            part = norm(part)
        numbers = rearrange(part, "b n e -> b (n e)")
        part = rearrange(numbers, f"b ({recipe.split}) -> b h n d", h=count, n=flat[0].shape[1])
        if norm is not None and where == "head":
            part = norm(part)
        split.append(_rotated(part, name, recipe, probe))
    query, key, value = split
    if recipe.across == "heads":
        query, key, value = (rearrange(part, "b h n d -> b n h d") for part in split)
        return query, key, value
    group = heads // kv_heads
    key, value = (
        repeat(part, f"b k j d -> b ({order}) j d", g=group)
        for part, order in zip((key, value), recipe.groups, strict=True)
    )
    return query, key, value


def _rotated(x: Tensor, name: str, recipe: Recipe, probe: Probe) -> Tensor:
    """Rotate queries, keys or values by position, if the recipe says so."""
    if probe.rotary is None or name not in recipe.rotated:
        return x
    if recipe.rotation == "axis":
        return rearrange(probe.rotary(rearrange(x, "b h n d -> b n h d")), "b n h d -> b h n d")
    if recipe.rotation != "layout":
        return probe.rotary(x)
    width = getattr(probe.rotary, "dim", x.shape[-1])
    half = torch.arange(width, device=x.device)
    neighbours = rearrange(half, "(two d) -> (d two)", two=2)
    if getattr(probe.rotary, "interleaved", False):
        neighbours = rearrange(half, "(d two) -> (two d)", two=2)
    rest = torch.arange(width, x.shape[-1], device=x.device)
    order = torch.cat([neighbours, rest])
    return probe.rotary(x[..., order.argsort()])[..., order]


def _allowed(recipe: Recipe, probe: Probe) -> tuple[Tensor | None, Tensor | None]:
    """Which key each query may attend to, ``(b, 1, i, j)``: by causal rule and window, and by padding."""
    batch, tokens = probe.x.shape[:2]
    if recipe.across == "heads":
        by_position = _positions(recipe, probe, probe.num_heads)
        return None if by_position is None else by_position[None, None], None
    by_position = _positions(recipe, probe, batch if recipe.sequence_first else tokens)
    if by_position is not None:
        by_position = repeat(
            by_position, "i j -> b 1 i j", b=tokens if recipe.sequence_first else batch
        )
    if probe.real is None or recipe.padding == "ignored":
        return by_position, None
    real = ~probe.real if "inverted" in recipe.padding else probe.real
    pattern = "b n -> b 1 n j" if "queries" in recipe.padding else "b n -> b 1 j n"
    return by_position, repeat(real, pattern, j=tokens)


def _positions(recipe: Recipe, probe: Probe, tokens: int) -> Tensor | None:
    causal = recipe.forced or (probe.causal and recipe.causal is not None)
    window = None if recipe.window is None or probe.window is None else probe.window + recipe.window
    if recipe.alone:
        return torch.eye(tokens, dtype=torch.bool, device=probe.x.device)
    if window == 0:
        return torch.zeros(tokens, tokens, dtype=torch.bool, device=probe.x.device)
    if causal and (recipe.causal or recipe.inverted):
        steps = torch.arange(tokens, device=probe.x.device)
        distance = rearrange(steps, "i -> i 1") - steps + (recipe.causal or 0)
        allowed = distance <= 0 if recipe.inverted else distance >= 0
        if window is not None and not recipe.inverted:
            allowed = allowed & (distance < window)
        return allowed
    size = (tokens, tokens)
    if window is not None:
        return sliding_window_mask(*size, window, causal=causal, device=probe.x.device)
    return causal_mask(*size, device=probe.x.device) if causal else None


def _merged(recipe: Recipe, probe: Probe, output: Tensor, features: int | None) -> Tensor:
    """Merge the heads, ``(b, h, n, d)``, and apply the output projection."""
    tokens = output.shape[2]
    how, _, again = recipe.merge.partition(" and ")
    if how in ("sum", "mean"):
        merged = output.sum(dim=1) if how == "sum" else output.mean(dim=1)
        merged = repeat(merged, "b n d -> b n (h d)", h=output.shape[1] if again else 1)
    else:
        numbers = rearrange(output, f"b h n d -> b ({recipe.merge})")
        merged = rearrange(numbers, "b (n e) -> b n e", n=tokens)
    if recipe.sequence_first:
        merged = rearrange(merged, "n b e -> b n e")
    if not recipe.out or probe.weights.out is None:
        return merged[..., :features]
    weight = probe.weights.out.T if "o" in recipe.transposed else probe.weights.out
    bias = probe.weights.out_bias if "o" in recipe.biased else None
    return _linear(merged, weight[:features], None if bias is None else bias[:features])


def known_mistakes(probe: Probe) -> Iterator[Mistake]:
    """Every mistake that could have been made with these weights and options, the likelier ones first."""
    yield from _wrong_scales(probe)
    yield from _wrong_orders(probe)
    yield from _wrong_rules(probe)
    yield from _wrong_positions(probe)
    yield from _wrong_projections(probe)
    yield from _wrong_heads(probe)
    yield from _wrong_roles(probe)


def _wrong_scales(probe: Probe) -> Iterator[Mistake]:
    width, dim, heads = probe.x.shape[-1], probe.head_dim, probe.num_heads
    wrong = [
        ("scale_sqrt_embed_dim", width**-0.5, "divided by sqrt(embed_dim)"),
        ("scale_missing", 1.0, "not scaled"),
        ("scale_without_sqrt", 1 / dim, "divided by head_dim, without the root (or twice by it)"),
        ("scale_inverted", dim**0.5, "multiplied by sqrt(head_dim)"),
        ("scale_wrong", dim**-0.5, "divided by sqrt(head_dim)"),
        ("scale_wrong", heads**-0.5, "divided by sqrt(num_heads)"),
        ("scale_wrong", 1 / width, "divided by embed_dim"),
        ("scale_wrong", dim**-0.25, "divided by the fourth root of head_dim"),
        ("scale_wrong", 1 / heads, "divided by num_heads"),
        ("scale_wrong", probe.x.shape[1] ** -0.5, "divided by sqrt(number of tokens)"),
    ]
    right = dim**-0.5 if probe.scale is None else probe.scale
    for name, scale, does in wrong:
        if abs(scale - right) > 1e-6 * scale:
            yield Mistake(name, {"scale": scale}, f"scores are {does}", name == "scale_wrong")


def _wrong_orders(probe: Probe) -> Iterator[Mistake]:
    for order in ("h n d", "h d n", "d n h", "d h n"):
        does = f"its numbers in the order ({order}), not (n h d)"
        yield Mistake("split_without_transpose", {"split": order}, f"the split reads {does}")
        yield Mistake(
            "merge_without_transpose",
            {"merge": order},
            f"the merge leaves {does}",
        )
    if probe.num_kv_heads == probe.num_heads:
        does = "each token attends among its own heads: (b, n, h, d) is not transposed"
        for mask in ({}, {"causal": None}) if probe.causal else ({},):
            changes = {"across": "heads", **mask}
            yield Mistake("split_without_transpose", changes, does)
            changes = {**changes, "merge": "h n d"}
            after = f"{does} before, and is after"
            yield Mistake("split_without_transpose", changes, after, rare=True)
        does = "the keys are viewed as (d, n), not transposed, for the scores"
        yield Mistake("tokens_scrambled", {"keys": "d n"}, does)
    does = "features of a token are ordered (d h), not (h d), in the "
    yield Mistake("heads_dim_major", {"split": "n d h"}, f"{does}split")
    yield Mistake("heads_dim_major", {"merge": "n d h"}, f"{does}merge")
    both = {"split": "n d h", "merge": "n d h"}
    yield Mistake("heads_dim_major", both, f"{does}split and in the merge")
    if probe.num_kv_heads == probe.num_heads:
        for layout in ("d three h", "d h three"):
            does = f"rows of the packed projection are read as ({layout})"
            yield Mistake("heads_dim_major", {"layout": layout}, does)
            yield Mistake("heads_dim_major", {"layout": layout, "merge": "n d h"}, does)
        if not probe.weights.packed:
            for layout in ("h three d", "h d three"):
                does = f"rows of the packed projection are read as ({layout}), not (three h d)"
                yield Mistake("qkv_layout_wrong", {"layout": layout}, does)
    again = "" if probe.weights.adds_heads else " and repeat"
    for how, does in (("sum", "summed"), ("mean", "averaged")):
        changes = {"merge": f"{how}{again}"}
        yield Mistake(
            "heads_added", changes, f"the heads are {does}{again}ed"[: None if again else -2]
        )
    if len({*probe.x.shape[:2]}) == 2:
        does = "attention runs along the batch axis, not along the tokens"
        yield Mistake("samples_mixed", {"sequence_first": True}, does)


def _wrong_rules(probe: Probe) -> Iterator[Mistake]:
    yield Mistake("softmax_over_queries", {"axis": -2}, "the softmax runs over the queries")
    yield Mistake("samples_mixed", {"axis": 0}, "the softmax runs over the batch")
    yield Mistake(
        "softmax_missing",
        {"softmaxes": 0},
        "the scores are the weights, without softmax",
        rare=True,
    )
    yield Mistake("softmax_twice", {"softmaxes": 2}, "the softmax is taken twice", rare=True)
    yield Mistake("softmax_over_heads", {"axis": 1}, "the softmax runs over the heads")
    yield Mistake("ignores_past", {"alone": True}, "each token attends to itself only")
    if probe.causal:
        if probe.window is None:
            yield Mistake("sees_future", {"causal": None}, "no causal mask is applied")
        for shift in (-1, 1):
            does = "one key too many" if shift > 0 else "not even the query's own key"
            changes = {"causal": shift}
            yield Mistake("causal_off_by_one", changes, f"the causal mask allows {does}")
        for shift in (0, 1):
            changes = {"inverted": True, "causal": shift}
            yield Mistake("mask_inverted", changes, "the causal mask forbids what it should allow")
    elif probe.window is None:
        yield Mistake("ignores_future", {"forced": True}, "a causal mask is applied")
    if probe.causal or probe.window:
        does = "forbidden scores become 0 before the softmax, not minus infinity"
        yield Mistake("mask_times_zero", {"forbid": ("zero", "inf")}, does)
        does = "weights are set to 0 after the softmax"
        yield Mistake("mask_after_softmax", {"forbid": ("after", "inf")}, does)
    if probe.window:
        for shift in (-1, 1):
            does = f"the window is {probe.window + shift} keys wide, not {probe.window}"
            yield Mistake("window_off_by_one", {"window": shift}, does)
        yield Mistake("window_ignored", {"window": None}, "the window is ignored")
    if probe.softcap is not None:
        yield Mistake("softcap_missing", {"softcap": False}, "no softcap is applied")


def _wrong_positions(probe: Probe) -> Iterator[Mistake]:
    if probe.norms is not None:
        yield Mistake("qk_norm_missing", {"norm": "none"}, "queries and keys are not normalised")
        for only, other in (("q", "keys"), ("k", "queries")):
            does = f"the {other} are not normalised"
            yield Mistake("qk_norm_missing", {"norm": f"head {only}"}, does)
    if probe.rotary is None:
        return
    yield Mistake("rotary_missing", {"rotated": ""}, "nothing is rotated")
    does = "pairs of features are taken in the other of the two layouts"
    yield Mistake("rotary_layout", {"rotation": "layout"}, does)
    yield Mistake("rotary_on_values", {"rotated": "qkv"}, "the values are rotated too")
    for name, only in (("q", "queries"), ("k", "keys")):
        yield Mistake("rotary_on_one_side", {"rotated": name}, f"only the {only} are rotated")
    does = "the rotation counts heads, not tokens"
    yield Mistake("rotary_wrong_axis", {"rotation": "axis"}, does)


def _wrong_projections(probe: Probe) -> Iterator[Mistake]:
    width, heads, weights = probe.x.shape[-1], probe.num_heads, probe.weights
    square = all(len(part) == width for part in (weights.query, weights.key, weights.value))
    if square and not weights.sliced and width % heads == 0:
        does = "each head projects its own slice of the tokens, not the whole tokens"
        yield Mistake("input_sliced_per_head", {"sliced": True}, does)
    if weights.out is not None and weights.out.shape[1] == width:
        does = "the output projection is not applied"
        yield Mistake("output_projection_missing", {"out": False}, does)
        yield Mistake("weight_transposed", {"transposed": "o"}, "the output matrix is transposed")
    inner = any(b is not None for b in (weights.query_bias, weights.key_bias, weights.value_bias))
    outer = weights.out_bias is not None
    for part, left in (("query, key and value", "o"), ("output", "qkv"), ("any projection", "")):
        if (inner or left == "qkv") and (outer or left == "o"):
            does = f"the bias of {part} is not added"
            yield Mistake("bias_missing", {"biased": left}, does, rare=True)
    if square and not weights.sliced:
        for part in ("qkvo", "qkv", "q", "k", "v"):
            does = f"x @ W stands where x @ W.T is meant, for {', '.join(part)}"
            yield Mistake("weight_transposed", {"transposed": part}, does, len(part) == 1)


def _wrong_heads(probe: Probe) -> Iterator[Mistake]:
    width, dim = len(probe.weights.query), probe.head_dim
    if probe.num_kv_heads != probe.num_heads:
        if probe.num_kv_heads > 1:
            does = "key/value heads are tiled (0 1 0 1), not repeated (0 0 1 1)"
            for groups in (("g k", "g k"), ("g k", "k g"), ("k g", "g k")):
                yield Mistake("kv_heads_tiled", {"groups": groups}, does)
        return
    if probe.norms is not None or probe.rotary is not None:
        return
    for heads in (count for count in range(1, width + 1) if width % count == 0):
        if heads == probe.num_heads:
            continue
        name = "single_head" if heads == 1 else "num_heads_wrong"
        does = f"there are {heads} heads of {width // heads} features"
        if heads == 1:
            does = "one softmax runs over the full width: a single head"
        for scale, by in ((heads / width) ** 0.5, "own"), (dim**-0.5, "declared"):
            changes = {"heads": heads, "scale": scale if probe.scale is None else probe.scale}
            rule = f"{does}; scores are divided by the root of its {by} width"
            likely = heads in (1, dim, 2 * probe.num_heads, probe.num_heads / 2) and by == "own"
            yield Mistake(name, changes, rule, rare=not likely and heads > 1)


def _wrong_roles(probe: Probe) -> Iterator[Mistake]:
    rows = {name: len(part) for name, part in zip("qkv", probe.weights[:3], strict=True)}
    rows["x"] = probe.x.shape[-1]
    wanted = [rows[name] for name in "qkv"]
    names = dict(zip("qkvx", ("the query's", "the key's", "the value's", "no"), strict=True))
    for chosen in itertools.product("qkvx", repeat=3):
        if chosen == ("q", "k", "v") or [rows[name] for name in chosen] != wanted:
            continue
        name = "projection_skipped" if "x" in chosen else "projection_reused"
        if {*chosen} == {*"qkv"}:
            name = "qkv_order_swapped"
        does = ", ".join(
            f"the {role} comes from {names[used]} projection"
            for role, used in zip(("query", "key", "value"), chosen, strict=True)
            if role[0] != used
        )
        changed = sum(a != b for a, b in zip(chosen, "qkv", strict=True))
        rare = changed > 1 and {*chosen} != {*"qkv"}
        yield Mistake(name, {"roles": "".join(chosen)}, does, rare)


def explain(
    answers: Sequence[tuple[Probe, Tensor]],
    conventions: Sequence[Recipe],
    *,
    tolerance: float,
    certain: float | None = None,
    mistakes: Sequence[Mistake] | None = None,
) -> Explanation | None:
    """Search for the recipe that gives one of the answers: without a mistake, then with one, then with two.

    Args:
        answers: Probes, and what the candidate answered to each, shape ``(b, n, e)``. Pairs are tried on the last.
        conventions: Recipes that are all right, such as two orders of packed rows.
        tolerance: Largest difference without a mistake, in standard deviations of the answer.
        certain: Largest difference with a mistake; as ``tolerance`` if None.
        mistakes: What to try; all known ones if None.

    Returns:
        The explanation with the fewest mistakes, or None.
    """
    known = known_mistakes(answers[0][0]) if mistakes is None else mistakes
    for chosen in _choices(list(known)):
        limit = certain if chosen and certain is not None else tolerance
        changes = {name: value for mistake in chosen for name, value in mistake.changes.items()}
        for convention in conventions:
            recipe = replace(convention, **changes)
            for number, (probe, target) in enumerate(answers):
                if len(chosen) > 1 and number < len(answers) - 1:
                    continue
                if recipe_error(recipe, probe, target, SHOWN_FEATURES) < limit:
                    error = recipe_error(recipe, probe, target)
                    if error < limit:
                        return Explanation(recipe, chosen, error, number)
    return None


def _choices(mistakes: list[Mistake]) -> Iterator[tuple[Mistake, ...]]:
    """No mistake, each one, then all pairs that do not touch the same choice."""
    yield ()
    yield from ((mistake,) for mistake in mistakes)
    common = [mistake for mistake in mistakes if not mistake.rare]
    for first, second in itertools.combinations(common, 2):
        if first.name != second.name and first.changes.keys().isdisjoint(second.changes):
            yield first, second


def recipe_error(
    recipe: Recipe, probe: Probe, target: Tensor, features: int | None = None
) -> float:
    """Largest difference between a recipe's output and ``target``, in standard deviations of the target."""
    try:
        output, rows = attend_with(recipe, probe, features)
    except (RuntimeError, EinopsError):
        return torch.inf
    target = target[..., :features]
    if output.shape != target.shape or not rows.any():
        return torch.inf
    expected = target[rows].detach().double()
    error = (output[rows].detach().double() - expected).abs().max() / expected.std().clamp_min(
        1e-12
    )
    return float(error.nan_to_num(torch.inf))

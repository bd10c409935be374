"""reference_attention against PyTorch's attention, against loops over the definition, and at its edges."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mha_lib import AttentionOutput, causal_mask, reference_attention
from mha_lib.masks import combine_masks
from tests.support import BACKWARD, FORWARD, Draw, assert_near, draws
from tests.tolerances import DROPOUT_STANDARD_ERRORS, HAND_WRITTEN

B, H, I, J, D = 2, 4, 5, 7, 8  # noqa: E741
Shape = tuple[int, ...]
MASK_SHAPES = [None, (I, J), (B, 1, 1, J), (B, H, I, J)]
BIAS_SHAPES = [None, (H, I, J), (B, 1, I, J)]


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
) -> Tensor:
    """PyTorch's attention in float64, mask and bias in one tensor."""
    shape = (*query.shape[:3], key.shape[2])
    added = torch.zeros(shape, dtype=torch.float64) if bias is None else bias.expand(shape)
    if allowed is not None:
        added = added.masked_fill(~allowed, -math.inf)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=added, scale=scale, enable_gqa=True
    )


def both_allow(mask: Tensor | None, causal: bool) -> Tensor | None:
    if not causal:
        return mask
    lower = torch.ones(I, J, dtype=torch.bool).tril()
    return lower if mask is None else mask & lower


@pytest.mark.parametrize("dtype", FORWARD, ids=str)
@pytest.mark.parametrize("mask_shape", MASK_SHAPES, ids=lambda shape: f"mask{shape}")
@pytest.mark.parametrize("bias_shape", BIAS_SHAPES, ids=lambda shape: f"bias{shape}")
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("scale", [None, 0.3], ids=lambda scale: f"scale{scale}")
@pytest.mark.parametrize("kv_heads", [H, 2, 1], ids=lambda heads: f"kv{heads}")
@pytest.mark.parametrize("value_dim", [D, 3], ids=lambda width: f"v{width}")
def test_equals_sdpa_forward_and_backward(
    dtype: torch.dtype,
    mask_shape: Shape | None,
    bias_shape: Shape | None,
    causal: bool,
    scale: float | None,
    kv_heads: int,
    value_dim: int,
) -> None:
    draw = Draw(1)
    shapes: list[Shape] = [(B, H, I, D), (B, kv_heads, J, D), (B, kv_heads, J, value_dim)]
    shapes += [] if bias_shape is None else [bias_shape]
    inputs = [draw.normal(*shape, dtype=dtype, grad=True) for shape in shapes]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    mask = None if mask_shape is None else draw.mask(*mask_shape)
    upstream = draw.normal(B, H, I, value_dim, dtype=dtype)

    bias, exact_bias = (tensors[3] if bias_shape else None for tensors in (inputs, exact))
    ours = combine_masks(mask, causal_mask(I, J, query_offset=0) if causal else None)
    output = reference_attention(*inputs[:3], mask=ours, bias=bias, scale=scale).output
    theirs = both_allow(mask, causal)
    expected = sdpa(exact[0], exact[1], exact[2], theirs, exact_bias, scale)

    assert output.dtype == dtype
    assert_near(output, expected, FORWARD[dtype])
    gradients = torch.autograd.grad(output, inputs, upstream)
    exact_gradients = torch.autograd.grad(expected, exact, upstream.double())
    for got, wanted in zip(gradients, exact_gradients, strict=True):
        assert got.dtype == dtype
        assert_near(got, wanted, BACKWARD[dtype])


def test_equals_sdpa_on_random_sizes() -> None:
    for draw in draws():
        batch, kv_heads, group = draw.size(1, 3), draw.size(1, 3), draw.size(1, 3)
        queries, keys, width, value_dim = (draw.size(1, 9) for _ in range(4))
        query = draw.normal(batch, kv_heads * group, queries, width)
        key = draw.normal(batch, kv_heads, keys, width)
        value = draw.normal(batch, kv_heads, keys, value_dim)
        mask = draw.mask(batch, 1, queries, keys)
        output, weights = reference_attention(query, key, value, mask=mask)
        identity = torch.eye(keys, dtype=torch.float64).expand(batch, kv_heads, keys, keys)
        assert_near(output, sdpa(query, key, value, mask, None, None), HAND_WRITTEN)
        assert_near(weights, sdpa(query, key, identity, mask, None, None), HAND_WRITTEN)


def by_hand(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor,
    bias: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The definition in loops and Python floats: scale, softcap, bias, mask, sink, softmax."""
    batch, heads, queries, _ = query.shape
    keys, group = key.shape[2], heads // key.shape[1]
    output = np.zeros((batch, heads, queries, value.shape[-1]))
    weights = np.zeros((batch, heads, queries, keys))
    for b, h, i in np.ndindex(batch, heads, queries):
        powers: dict[int, float] = {}
        for j in range(keys):
            score = scale * math.fsum(
                map(float.__mul__, *_lists(query[b, h, i], key[b, h // group, j]))
            )
            score = score if softcap is None else softcap * math.tanh(score / softcap)
            if mask[b, h, i, j]:
                powers[j] = math.exp(score + bias[b, h, i, j].item())
        total = math.fsum(powers.values())
        total += 0.0 if sinks is None else math.exp(sinks[h].item())
        for j, power in powers.items():
            weights[b, h, i, j] = power / total
            output[b, h, i] += power / total * value[b, h // group, j].numpy()
    return torch.from_numpy(output), torch.from_numpy(weights)


def _lists(*vectors: Tensor) -> list[list[float]]:
    return [vector.tolist() for vector in vectors]


@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("softcap", [None, 0.5], ids=lambda cap: f"softcap {cap}")
def test_equals_the_definition_in_loops(
    softcap: float | None, with_sinks: bool, kv_heads: int
) -> None:
    draw = Draw(2)
    query, key, value = (
        draw.normal(B, heads, n, width)
        for heads, n, width in ((H, I, D), (kv_heads, J, D), (kv_heads, J, 3))
    )
    mask, bias = draw.mask(B, H, I, J), 3 * draw.normal(B, H, I, J)
    mask[0, 1, 2] = False
    sinks = draw.normal(H) if with_sinks else None
    got = reference_attention(
        query, key, value, mask=mask, bias=bias, scale=0.7, softcap=softcap, sinks=sinks
    )
    wanted = by_hand(
        query, key, value, mask=mask, bias=bias, scale=0.7, softcap=softcap, sinks=sinks
    )
    assert_near(got.output, wanted[0], HAND_WRITTEN)
    assert_near(got.weights, wanted[1], HAND_WRITTEN)


FORBIDDERS: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "mask": lambda allowed: {"mask": allowed},
    "bias": lambda allowed: {"bias": torch.zeros(I, J).masked_fill(~allowed, -math.inf)},
    "each half": lambda allowed: {
        "mask": allowed | (torch.arange(J) < 3),
        "bias": torch.zeros(I, J).masked_fill(~allowed & (torch.arange(J) < 3), -math.inf),
    },
}
EMPTY_ROW = 2


@pytest.mark.parametrize("forbid", FORBIDDERS)
@pytest.mark.parametrize("sink", [None, 0.5, -math.inf], ids=lambda sink: f"sink {sink}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_query_without_keys_gives_zeros_and_moves_nothing(
    forbid: str, sink: float | None, dtype: torch.dtype
) -> None:
    draw = Draw(3)
    allowed = draw.mask(I, J)
    allowed[EMPTY_ROW] = False
    rest = [i for i in range(I) if i != EMPTY_ROW]
    options = FORBIDDERS[forbid](allowed)
    if "bias" in options:
        options["bias"].requires_grad_()
    if sink is not None:
        options["sinks"] = torch.full((H,), sink).requires_grad_()
    inputs = [draw.normal(B, H, n, D, dtype=dtype, grad=True) for n in (I, J, J)]
    upstream = draw.normal(B, H, I, D, dtype=dtype)

    output, weights = reference_attention(*inputs, **options)
    assert not output[:, :, EMPTY_ROW].any()
    assert not weights[:, :, EMPTY_ROW].any()
    leaves = [*inputs, *(tensor for tensor in options.values() if tensor.requires_grad)]
    gradients = torch.autograd.grad(output, leaves, upstream)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][:, :, EMPTY_ROW].any()

    without = {
        name: tensor[rest] if name != "sinks" else tensor for name, tensor in options.items()
    }
    shorter = reference_attention(inputs[0][:, :, rest], *inputs[1:], **without).output
    for got, wanted in zip(
        gradients, torch.autograd.grad(shorter, leaves, upstream[:, :, rest]), strict=True
    ):
        assert_near(got, wanted, FORWARD[dtype])


@pytest.mark.parametrize("sinks", [None, torch.zeros(H)], ids=["no sinks", "sinks"])
def test_no_keys_at_all_gives_zeros(sinks: Tensor | None) -> None:
    draw = Draw(4)
    query, key, value = (
        draw.normal(B, H, n, width, grad=True) for n, width in ((I, D), (0, D), (0, 3))
    )
    output, weights = reference_attention(query, key, value, sinks=sinks)
    assert output.shape == (B, H, I, 3)
    assert weights.shape == (B, H, I, 0)
    assert not output.any()
    (gradient,) = torch.autograd.grad(output.sum(), query)
    assert not gradient.any()


@pytest.mark.parametrize(
    ("batch", "heads", "queries"),
    [(0, H, I), (B, H, 0), (B, 0, I)],
    ids=["batch", "heads", "queries"],
)
def test_other_axes_may_be_empty(batch: int, heads: int, queries: int) -> None:
    query, key = torch.zeros(batch, heads, queries, D), torch.zeros(batch, H, J, D)
    output, weights = reference_attention(query, key, key)
    assert output.shape == (batch, heads, queries, D)
    assert weights.shape == (batch, heads, queries, J)


@pytest.mark.parametrize("dtype", FORWARD, ids=str)
def test_huge_scores_stay_finite(dtype: torch.dtype) -> None:
    draw = Draw(5)
    query, key, value = (draw.normal(B, H, n, D, dtype=dtype) for n in (I, J, J))
    output, weights = reference_attention(300 * query, 300 * key, value)
    scores = (300 * query).double() @ (300 * key).double().mT
    assert scores.max() > torch.finfo(torch.float16).max
    assert output.isfinite().all()
    winner = scores.argmax(-1)
    assert torch.equal(weights.argmax(-1), winner)
    best = value.gather(2, winner[..., None].expand(-1, -1, -1, D))
    decided = (scores.topk(2).values.diff() < -1e3).expand(-1, -1, -1, D)
    assert decided.any()
    assert torch.equal(output[decided], best[decided])


def test_weights_come_before_dropout() -> None:
    draw = Draw(6)
    query, key, value = (draw.normal(B, H, n, D) for n in (I, J, J))
    plain = reference_attention(query, key, value)
    assert torch.equal(reference_attention(query, key, value, dropout_p=0.0).output, plain.output)
    nothing = reference_attention(query, key, value, dropout_p=1.0)
    assert not nothing.output.any()
    assert torch.equal(nothing.weights, plain.weights)


def test_dropout_drops_or_scales_each_weight() -> None:
    torch.manual_seed(0)
    draw, copies, dropout_p = Draw(7), 4000, 0.25
    query, key = draw.normal(1, 1, 2, D), draw.normal(1, 1, 3, D)
    identity = torch.eye(3, dtype=torch.float64)[None, None]
    inputs = (tensor.expand(copies, -1, -1, -1) for tensor in (query, key, identity))
    output, weights = reference_attention(*inputs, dropout_p=dropout_p)
    kept = output != 0
    assert_near(output[kept], (weights / (1 - dropout_p))[kept], HAND_WRITTEN)
    share = kept.double().mean(0)
    error = DROPOUT_STANDARD_ERRORS * math.sqrt(dropout_p * (1 - dropout_p) / copies)
    assert (share - (1 - dropout_p)).abs().max() < error
    spread = weights[0] * math.sqrt(dropout_p / (1 - dropout_p) / copies)
    assert ((output.mean(0) - weights[0]).abs() < DROPOUT_STANDARD_ERRORS * spread).all()


@pytest.mark.parametrize("softcap", [None, 1.5], ids=lambda cap: f"softcap {cap}")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_gradients_are_the_numerical_ones(softcap: float | None, kv_heads: int) -> None:
    draw = Draw(8)
    mask = draw.mask(2, 1, 3, 4)
    mask[0, 0, 1] = False
    shapes = [(2, 4, 3, 2), (2, kv_heads, 4, 2), (2, kv_heads, 4, 3), (4, 3, 4), (4,)]

    def attend(
        query: Tensor, key: Tensor, value: Tensor, bias: Tensor, sinks: Tensor
    ) -> AttentionOutput:
        return reference_attention(
            query, key, value, mask=mask, bias=bias, softcap=softcap, sinks=sinks
        )

    inputs = [draw.normal(*shape, grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(attend, inputs, fast_mode=True)


def test_vmap_and_grad_transform_it() -> None:
    draw = Draw(9)
    query, key, value = (draw.normal(3, B, H, n, D, grad=True) for n in (I, J, J))
    mask = draw.mask(I, J)

    def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return reference_attention(query, key, value, mask=mask).output.square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(query, key, value)
    total = sum(loss(query[n], key[n], value[n]) for n in range(3))
    assert isinstance(total, Tensor)
    wanted = torch.autograd.grad(total, (query, key, value))
    for got, gradient in zip(per_sample, wanted, strict=True):
        assert_near(got, gradient, HAND_WRITTEN)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiles_in_one_graph() -> None:
    draw = Draw(10)
    query, key, value = (draw.normal(1, 2, n, 4, dtype=torch.float32) for n in (3, 3, 3))
    compiled = torch.compile(reference_attention, fullgraph=True)
    mask, sinks = causal_mask(3, 3), torch.zeros(2)
    got = compiled(query, key, value, mask=mask, sinks=sinks)
    wanted = reference_attention(query, key, value, mask=mask, sinks=sinks)
    assert_near(got.output, wanted.output, FORWARD[torch.float32])
    assert_near(got.weights, wanted.weights, FORWARD[torch.float32])


@pytest.mark.parametrize("dtype", FORWARD, ids=str)
def test_returns_output_and_weights_in_the_dtype_of_the_query(dtype: torch.dtype) -> None:
    query = torch.zeros(B, H, I, D, dtype=dtype)
    bias, sinks = torch.zeros(I, I, dtype=torch.float64), torch.zeros(H, dtype=torch.bfloat16)
    result = reference_attention(query, query, query, bias=bias, sinks=sinks)
    assert type(result) is AttentionOutput
    assert result._fields == ("output", "weights")
    assert result.output.dtype == result.weights.dtype == dtype
    assert result.weights.shape == (B, H, I, I)


@pytest.mark.parametrize("scale", [2, np.float32(0.5), np.float64(0.5)], ids=repr)
def test_numbers_may_be_ints_or_come_from_numpy(scale: float) -> None:
    query = Draw(11).normal(B, H, I, D, grad=True)
    got = reference_attention(query, query, query, scale=scale, softcap=scale)
    wanted = reference_attention(query, query, query, scale=float(scale), softcap=float(scale))
    assert torch.equal(got.output, wanted.output)
    (gradient,) = torch.autograd.grad(got.output.sum(), query)
    assert gradient.isfinite().all()


def test_runs_on_meta_tensors() -> None:
    query = torch.zeros(B, H, I, D, device="meta")
    mask = torch.ones(I, I, dtype=torch.bool, device="meta")
    assert reference_attention(query, query, query, mask=mask).output.is_meta

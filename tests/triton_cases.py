"""What the Triton kernels compute, in a process of its own that test_triton.py starts.

Where there is a CUDA device they run on it. Elsewhere Triton's interpreter runs them on the CPU: it must be chosen,
by TRITON_INTERPRET=1, before triton is imported, and holds for the whole process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from mha_lib import causal_mask, reference_attention, sliding_window_mask
from tests.support import DRAWS, Draw, assert_near
from tests.tolerances import TRITON

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Attend = Callable[..., Tensor]


@pytest.fixture(scope="module")
def attend() -> Attend:
    from mha_lib.triton_kernel import triton_attention

    return triton_attention


def inputs(
    *, i: int, j: int, d: int, v: int, group: int, dtype: torch.dtype, seed: int = 0
) -> list[Tensor]:
    """Query, key and value as split_heads leaves them, and a gradient of the output."""
    draw, kv_heads = Draw(seed), 2 if group < 3 else 1
    heads = kv_heads * group
    shapes = [(2, i, heads, d), (2, j, kv_heads, d), (2, j, kv_heads, v), (2, i, heads, v)]
    return [
        draw.normal(*shape, dtype=dtype).to(DEVICE).transpose(1, 2).requires_grad_()
        for shape in shapes
    ]


def mask_of(
    i: int, j: int, *, causal: bool, window: int | None, query_offset: int | Tensor
) -> Tensor | None:
    """What the kernel should allow."""
    if window is not None:
        return sliding_window_mask(
            i, j, window, query_offset=query_offset, causal=causal, device=DEVICE
        )
    return causal_mask(i, j, query_offset=query_offset, device=DEVICE) if causal else None


def compare(attend: Attend, tensors: list[Tensor], **options: Any) -> None:
    """Output and gradients are the reference's."""
    query, key, value, d_output = tensors
    tolerance = TRITON[str(query.dtype).removeprefix("torch.")]
    band = {"causal": False, "window": None, "query_offset": 0, **options}
    scale = band.pop("scale", None)
    mask = mask_of(query.shape[2], key.shape[2], **band)
    exact = [x.double() for x in (query, key, value)]
    expected = reference_attention(*exact, mask=mask, scale=scale).output
    wanted = torch.autograd.grad(expected, tensors[:3], d_output.double())
    output = attend(query, key, value, **options)
    got = torch.autograd.grad(output, tensors[:3], d_output)
    assert output.dtype == query.dtype
    for actual, reference in zip((output, *got), (expected, *wanted), strict=True):
        assert_near(actual, reference, tolerance)


# i, j, d, v, query heads of each key head
SHAPES = [
    (17, 40, 40, 24, 2),
    (40, 17, 8, 64, 4),
    (1, 33, 128, 5, 1),
] + (DRAWS > 50) * [
    (1, 1, 32, 32, 1),
    (65, 65, 16, 16, 1),
    (64, 130, 32, 32, 1),
    (33, 20, 64, 128, 2),
]
BANDS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"causal": True, "query_offset": 11},
    {"causal": True, "query_offset": -13},
    {"causal": True, "query_offset": torch.tensor([5, -9])},
    {"causal": True, "window": 6, "query_offset": -2},
    {"window": 9, "query_offset": 4},
    {"window": 9, "query_offset": torch.tensor([-30, 1])},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
@pytest.mark.parametrize("band", BANDS, ids=lambda band: "-".join(band) or "all")
def test_output_and_gradients(
    attend: Attend, shape: tuple[int, int, int, int, int], band: dict[str, Any]
) -> None:
    i, j, d, v, group = shape
    compare(attend, inputs(i=i, j=j, d=d, v=v, group=group, dtype=torch.float64), **band)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [32, 128])
def test_lower_precision(attend: Attend, dtype: torch.dtype, d: int) -> None:
    tensors = inputs(i=34, j=37, d=d, v=32, group=2, dtype=dtype)
    compare(attend, tensors, causal=True, query_offset=2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0])
def test_scale(attend: Attend, dtype: torch.dtype, scale: float) -> None:
    tensors = inputs(i=5, j=6, d=16, v=16, group=1, dtype=dtype)
    compare(attend, tensors, causal=True, scale=scale)


@pytest.mark.parametrize("window", [1, 2**61])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("offset", [2**61, -(2**61), torch.tensor([2**60, -(2**61)])])
def test_far_bounds(attend: Attend, window: int, causal: bool, offset: int | Tensor) -> None:
    tensors = inputs(i=4, j=19, d=16, v=16, group=1, dtype=torch.float64)
    compare(attend, tensors, causal=causal, window=window, query_offset=offset)


def test_empty_rows_give_zeros(attend: Attend) -> None:
    query, key, value, _ = inputs(i=6, j=4, d=16, v=16, group=1, dtype=torch.float64)
    output = attend(query, key, value, causal=True, query_offset=-3)
    assert (output[:, :, :3] == 0).all()
    assert (output[:, :, 3:] != 0).any()
    (gradient,) = torch.autograd.grad(output.sum(), query)
    assert (gradient[:, :, :3] == 0).all()
    output = attend(query, key, value, causal=True, query_offset=-100)
    assert all((x == 0).all() for x in torch.autograd.grad(output.sum(), (query, key, value)))


@pytest.mark.parametrize(("i", "j"), [(0, 3), (3, 0), (0, 0)])
def test_zero_length(attend: Attend, i: int, j: int) -> None:
    query, key, value, _ = inputs(i=i, j=j, d=16, v=8, group=2, dtype=torch.float64)
    output = attend(query, key, value, causal=True)
    assert output.shape == (2, 4, i, 8)
    assert (output == 0).all()
    for x, gradient in zip(
        (query, key, value),
        torch.autograd.grad(output.sum(), (query, key, value)),
        strict=True,
    ):
        assert gradient.shape == x.shape
        assert (gradient == 0).all()


def test_any_strides(attend: Attend) -> None:
    packed = Draw().normal(2, 7, 3 * 4 * 16).to(DEVICE).requires_grad_()
    split = rearrange(packed, "b n (three h d) -> three b h n d", three=3, h=4)
    last = Draw(1).normal(2, 4, 16, 7).to(DEVICE).requires_grad_().transpose(2, 3)
    shared = Draw(2).normal(1, 1, 7, 16).to(DEVICE).requires_grad_().expand(2, 4, 7, 16)
    compare(attend, [*split, Draw(3).normal(2, 4, 7, 16).to(DEVICE)], causal=True)
    compare(attend, [last, shared, last, Draw(3).normal(1).to(DEVICE).expand(2, 4, 7, 16)])


def test_large_scores(attend: Attend) -> None:
    tensors = inputs(i=5, j=5, d=16, v=16, group=1, dtype=torch.float64)
    tensors = [50 * tensors[0], -50 * tensors[0].detach().requires_grad_(), *tensors[2:]]
    compare(attend, tensors)


def test_vmap_and_grad(attend: Attend) -> None:
    draw, offset = Draw(), torch.tensor([1, -2], device=DEVICE)
    query = draw.normal(2, 2, 3, 5, 16).to(DEVICE)  # mapped along its third axis
    key, value = draw.normal(3, 2, 1, 6, 16).to(DEVICE), draw.normal(2, 1, 6, 8).to(DEVICE)
    mask = causal_mask(5, 6, query_offset=offset, device=DEVICE)

    def ours(*x: Tensor) -> Tensor:
        return attend(*x, causal=True, query_offset=offset)

    def reference(*x: Tensor) -> Tensor:
        return reference_attention(x[0], x[1], x[2], mask=mask).output

    def gradients(function: Attend) -> list[tuple[Tensor, ...]]:
        def mapped(*x: Tensor) -> Tensor:
            return torch.func.vmap(function, (2, 0, None))(*x)

        def loss(inner: Attend) -> Attend:
            return lambda *x: inner(*x).sin().square().sum()

        of_each = torch.func.grad(loss(function), (0, 1, 2))
        return [
            (mapped(query, key, value),),
            torch.func.grad(loss(mapped), (0, 1, 2))(query, key, value),
            torch.func.vmap(of_each, (2, 0, None))(query, key, value),
        ]

    for ours_, wanted in zip(gradients(ours), gradients(reference), strict=True):
        for actual, expected in zip(ours_, wanted, strict=True):
            assert_near(actual, expected, TRITON["float64"])


def test_second_derivative_is_refused(attend: Attend) -> None:
    query, key, value, _ = inputs(i=3, j=3, d=16, v=16, group=1, dtype=torch.float64)
    output = attend(query, key, value).sin().sum()
    (gradient,) = torch.autograd.grad(output, query, create_graph=True)
    with pytest.raises(RuntimeError, match="triton backend"):
        torch.autograd.grad(gradient.sum(), query)


def test_offsets_that_do_not_lie_side_by_side(attend: Attend) -> None:
    draw = Draw(9)
    query, key = draw.normal(2, 2, 5, 16), draw.normal(2, 2, 9, 16)
    for offsets in (torch.tensor([4, 0, 2, 0])[::2], torch.tensor([3]).expand(2)):
        mask = causal_mask(5, 9, query_offset=offsets)
        expected = reference_attention(query, key, key, mask=mask).output
        dtype = torch.float64 if DEVICE == "cpu" else torch.float32
        x, y = query.to(DEVICE, dtype), key.to(DEVICE, dtype)
        got = attend(x, y, y, causal=True, query_offset=offsets.to(DEVICE))
        assert_near(got.cpu(), expected, TRITON[str(dtype).removeprefix("torch.")])

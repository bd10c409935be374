"""What a project that adopts the library leans on: few graphs, full precision, faithful conversions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mha_lib import (
    SimpleMultiHeadAttention,
    SplitMultiHeadAttention,
    causal_mask,
    padding_mask,
    plot_attention,
    reference_attention,
)
from tests.tolerances import AUTOCAST

MODULES = [SimpleMultiHeadAttention, SplitMultiHeadAttention]
MOST_GRAPHS = 2  # one for the first size, one for all others


def graphs_of(function: Callable[[int], Tensor]) -> int:
    """Compile and call with five sizes; return how many graphs that took."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for size in range(3, 8):
        compiled(size)
    return counter.frame_count


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("number", [int, np.int64])
def test_new_lengths_do_not_compile_new_graphs(
    kind: type[nn.Module], number: Callable[[int], int]
) -> None:
    module = kind(number(12), number(3), causal=True)
    assert graphs_of(lambda n: module(torch.zeros(2, n, 12))) <= MOST_GRAPHS


def test_new_offsets_and_lengths_of_masks_do_not_compile_new_graphs() -> None:
    assert graphs_of(lambda offset: causal_mask(1, 8, query_offset=offset)) <= MOST_GRAPHS
    lengths = torch.tensor([1, 2])
    assert graphs_of(lambda longest: padding_mask(lengths, longest)) <= MOST_GRAPHS


def test_autocast_does_not_lower_the_precision() -> None:
    torch.manual_seed(0)
    query, key, value = (9 * torch.randn(2, 3, 16, 64) for _ in range(3))
    exact = reference_attention(query.double(), key.double(), value.double()).output
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = reference_attention(query, key, value).output
    torch.testing.assert_close(output.double(), exact, rtol=AUTOCAST.rtol, atol=AUTOCAST.atol)


@pytest.mark.parametrize("kind", MODULES)
def test_autocast_reaches_the_projections(kind: type[nn.Module]) -> None:
    module, x = kind(12, 3), torch.randn(2, 5, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


def convert(module: nn.Module) -> nn.Module:
    if isinstance(module, SimpleMultiHeadAttention):
        return module.split()
    assert isinstance(module, SplitMultiHeadAttention)
    return module.fuse()


@pytest.mark.parametrize("kind", MODULES)
def test_conversion_refuses_a_mixture_of_biases(kind: type[nn.Module]) -> None:
    module = kind(12, 3)
    module.out_proj = nn.Linear(12, 12, bias=False)
    with pytest.raises(ValueError, match=r"needs a bias in every projection.*got a mixture"):
        convert(module)


@pytest.mark.parametrize("kind", MODULES)
def test_conversion_draws_no_random_numbers(kind: type[nn.Module]) -> None:
    module = kind(12, 3)
    before = torch.get_rng_state()
    convert(module)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", MODULES)
def test_conversion_shares_no_memory_and_trains(kind: type[nn.Module]) -> None:
    module = kind(12, 3).requires_grad_(False)
    converted = convert(module)
    old = {p.untyped_storage().data_ptr() for p in module.parameters()}
    assert not old & {p.untyped_storage().data_ptr() for p in converted.parameters()}
    assert all(p.requires_grad and p.is_leaf for p in converted.parameters())


def test_conversion_keeps_the_dtype_of_each_projection() -> None:
    module = SimpleMultiHeadAttention(12, 3)
    module.qkv_proj.double()
    heads = module.split().heads
    assert {p.dtype for p in heads.parameters()} == {torch.float64}


def test_weights_a_rounding_step_above_one_are_drawn() -> None:
    ones = torch.full((2, 2), 1.0 + torch.finfo(torch.float32).eps)
    assert plot_attention(ones, ["a", "b"]).axes


def test_a_dollar_sign_is_no_formula() -> None:
    figure = plot_attention(torch.eye(2), ["$$", "a"], titles=["$"])
    figure.canvas.draw()
    assert figure.axes[0].get_title() == "$"


@pytest.mark.parametrize("kind", MODULES)
def test_inputs_must_fit_the_module(kind: type[nn.Module]) -> None:
    module, x = kind(12, 3), torch.zeros(2, 5, 12)
    with pytest.raises(
        ValueError, match=r"query must have the dtype of the module.*float32.*float64"
    ):
        module(x.double())
    with pytest.raises(ValueError, match="query must have the device of the module, cpu, got meta"):
        module(x.to("meta"))
    with pytest.raises(TypeError, match="return_weights must be True or False, got str 'yes'"):
        module(x, return_weights="yes")

"""KVCache: what it returns, what it keeps, and that nothing bad gets in."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mha_lib import KVCache
from tests.support import DEVICES, Draw

B, K, D, LONGEST = 2, 3, 4, 10


def new(**options: Any) -> KVCache:
    return KVCache(B, K, D, **{"max_length": LONGEST, "dtype": torch.float64, **options})


def tokens(draw: Draw, count: int) -> tuple[Tensor, Tensor]:
    return draw.normal(B, K, count, D), draw.normal(B, K, count, D)


def filled(draw: Draw, count: int) -> KVCache:
    cache = new()
    cache.append(*tokens(draw, count))
    return cache


def same(one: KVCache, other: KVCache) -> bool:
    """Whether both hold the same tokens, and the same numbers in the memory behind them."""
    return (
        one.length == other.length
        and torch.equal(one.keys, other.keys)
        and torch.equal(one.values, other.values)
    )


@pytest.mark.parametrize("sizes", [[1] * 10, [10], [4, 1, 5], [0, 3, 0, 7, 0]], ids=str)
def test_appending_puts_tokens_side_by_side(sizes: list[int]) -> None:
    draw, cache = Draw(), new()
    keys, values = tokens(draw, LONGEST)
    start = 0
    for size in sizes:
        end = start + size
        found = cache.append(keys[:, :, start:end], values[:, :, start:end])
        assert cache.length == end
        assert torch.equal(found[0], keys[:, :, :end])
        assert torch.equal(found[1], values[:, :, :end])
        start = end


def test_what_is_returned_are_views_of_one_memory() -> None:
    draw, cache = Draw(), new()
    places = [x.data_ptr() for x in (cache.keys, cache.values)]
    first = cache.append(*tokens(draw, 4))
    before = [x.clone() for x in first]
    for count in (3, 1, 0):
        found = cache.append(*tokens(draw, count))
        assert [x.data_ptr() for x in found] == places
        assert [x.data_ptr() for x in (cache.keys, cache.values)] == places
        assert [x.stride() for x in found] == [cache.keys.stride()] * 2
    assert all(map(torch.equal, first, before))


def test_appending_copies_what_it_is_given() -> None:
    draw, cache = Draw(), new()
    key, value = tokens(draw, 3)
    keys, _ = cache.append(key, value)
    wanted = key.clone()
    key.zero_()
    assert torch.equal(keys, wanted)


def test_tokens_may_lie_in_memory_in_any_order() -> None:
    draw, cache = Draw(), new()
    key = draw.normal(B, 3, K, D).transpose(1, 2)
    value = draw.normal(1, 1, 3, 1).expand(B, K, 3, D)
    keys, values = cache.append(key, value)
    assert torch.equal(keys, key)
    assert torch.equal(values, value)


def test_truncate_forgets_the_last_tokens() -> None:
    draw, cache = Draw(), new()
    key, value = tokens(draw, 6)
    cache.append(key, value)
    cache.truncate(6)
    assert cache.length == 6
    cache.truncate(2)
    assert cache.length == 2
    more = tokens(draw, 3)
    keys, values = cache.append(*more)
    assert torch.equal(keys, torch.cat([key[:, :, :2], more[0]], dim=2))
    assert torch.equal(values, torch.cat([value[:, :, :2], more[1]], dim=2))
    cache.truncate(int(np.int64(0)))
    assert cache.length == 0
    cache.truncate(np.int64(0))  # type: ignore[arg-type]
    assert type(cache.length) is int


def test_reset_makes_room_for_everything() -> None:
    draw = Draw()
    cache = filled(draw, LONGEST)
    cache.reset()
    assert cache.length == 0
    key, value = tokens(draw, LONGEST)
    keys, values = cache.append(key, value)
    assert torch.equal(keys, key)
    assert torch.equal(values, value)


def test_a_cache_without_room() -> None:
    cache = new(max_length=0)
    keys, values = cache.append(*tokens(Draw(), 0))
    assert keys.shape == values.shape == (B, K, 0, D)
    with pytest.raises(ValueError, match="max_length=0, got 1 tokens after 0"):
        cache.append(*tokens(Draw(), 1))


@pytest.mark.parametrize("count", [5, 6, 11])
def test_overflow_overwrites_nothing(count: int) -> None:
    draw = Draw()
    cache = filled(draw, 6)
    before = copy.deepcopy(cache)
    with pytest.raises(ValueError, match=f"max_length=10, got {count} tokens after 6"):
        cache.append(*tokens(draw, count))
    assert same(cache, before)
    cache.append(*tokens(draw, 4))
    assert cache.length == LONGEST


GOOD = torch.ones(B, K, 2, D, dtype=torch.float64)
BAD: dict[str, tuple[str, Any, Any]] = {
    "a list": ("key must be a tensor", [1.0], GOOD),
    "no value": ("value must be a tensor", GOOD, None),
    "rank of key": ("key.*head_dim", GOOD[0], GOOD),
    "rank of value": ("value.*head_dim", GOOD, GOOD[..., 0]),
    "dtype of key": ("key.*dtype", GOOD.float(), GOOD),
    "dtype of value": ("value.*dtype", GOOD, GOOD.half()),
    "dtype of both": ("key.*dtype", GOOD.long(), GOOD.long()),
    "device of key": ("key.*device", GOOD.to("meta"), GOOD),
    "device of value": ("value.*device", GOOD, GOOD.to("meta")),
    "batch of key": ("key.*batch", GOOD[:1], GOOD),
    "batch of both": ("key.*batch", GOOD[:1], GOOD[:1]),
    "heads of key": ("key.*heads", GOOD[:, :1], GOOD),
    "heads of value": ("value.*heads", GOOD, GOOD[:, :1]),
    "head_dim of key": ("key.*head_dim", GOOD[..., :1], GOOD),
    "head_dim of value": ("value.*head_dim", GOOD, GOOD[..., :3]),
    "length of value": ("value.*length", GOOD, GOOD[:, :, :1]),
    "gradient of key": ("key.*gradient", GOOD.clone().requires_grad_(), GOOD),
    "gradient of value": ("value.*gradient", GOOD, GOOD.clone().requires_grad_()),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_append_leaves_the_cache_as_it_was(case: str) -> None:
    message, key, value = BAD[case]
    cache = filled(Draw(), 6)
    before = copy.deepcopy(cache)
    with pytest.raises((ValueError, TypeError), match=message):
        cache.append(key, value)
    assert same(cache, before)


@pytest.mark.parametrize("length", [-1, 7, 2.0, None, True])
def test_a_bad_truncate_leaves_the_cache_as_it_was(length: Any) -> None:
    cache = filled(Draw(), 6)
    before = copy.deepcopy(cache)
    with pytest.raises((ValueError, TypeError), match=r"\blength\b"):
        cache.truncate(length)
    assert same(cache, before)


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
def test_what_requires_a_gradient_is_taken_where_none_is_recorded(grad_mode: Any) -> None:
    draw, cache = Draw(), new()
    key, value = (x.requires_grad_() for x in tokens(draw, 3))
    with grad_mode():
        keys, values = cache.append(key, value)
    assert torch.equal(keys, key)
    assert torch.equal(values, value)
    assert not cache.keys.requires_grad
    assert not keys.requires_grad


def test_a_cache_lives_in_inference_mode_and_out_of_it() -> None:
    draw = Draw()
    with torch.inference_mode():
        inside = filled(draw, 3)
        assert inside.append(*tokens(draw, 2))[0].shape == (B, K, 5, D)
    cache = filled(draw, 3)
    with torch.inference_mode():
        cache.append(*tokens(draw, 2))
    cache.append(*tokens(draw, 2))
    assert cache.length == 7


def test_a_cache_is_no_part_of_a_graph() -> None:
    draw = Draw()
    cache = filled(draw, 3)
    keys, values = cache.append(*tokens(draw, 2))
    query = draw.normal(B, K, 1, D, grad=True)
    torch.autograd.backward((query @ keys.mT @ values).sum())
    assert query.grad is not None
    cache.append(*tokens(draw, 1))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_are_independent(how: str) -> None:
    draw = Draw()
    cache = filled(draw, 4)
    twin = copied(cache, how)
    assert same(cache, twin)
    before = copy.deepcopy(twin)
    cache.append(*tokens(draw, 3))
    cache.truncate(1)
    cache.append(*tokens(draw, 2))
    assert same(twin, before)
    twin.append(*tokens(draw, 6))
    assert twin.length == LONGEST


def copied(cache: KVCache, how: str) -> KVCache:
    if how == "deepcopy":
        return copy.deepcopy(cache)
    if how == "pickle":
        twin: KVCache = pickle.loads(pickle.dumps(cache))
        return twin
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    loaded: KVCache = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_device_and_dtype(device: str, dtype: torch.dtype) -> None:
    cache = KVCache(B, K, D, max_length=5, device=device, dtype=dtype)
    x = torch.ones(B, K, 2, D, device=device, dtype=dtype)
    for found in cache.append(x, x):
        assert found.dtype == dtype
        assert found.device.type == device
        assert found.shape == x.shape


def test_the_default_dtype_is_that_of_torch() -> None:
    assert KVCache(1, 1, 1, max_length=1).keys.dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert KVCache(1, 1, 1, max_length=1).keys.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_sizes_of_numpy_are_integers() -> None:
    cache = KVCache(np.int64(2), np.int32(3), np.int64(4), max_length=np.int64(5))  # type: ignore[arg-type]
    assert cache.keys.shape == cache.values.shape == (2, 3, 5, 4)


def test_representation() -> None:
    assert repr(filled(Draw(), 6)) == (
        "KVCache(2, 3, 4, max_length=10, dtype=torch.float64, device=cpu, length=6)"
    )


MOST_GRAPHS = 3  # one token after none, one token after one, one token at any later place


@pytest.mark.parametrize("first", [0, 1, 4])
def test_compiles_without_a_graph_for_each_token(first: int) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    draw, cache, plain = Draw(), new(max_length=20), new(max_length=20)
    counter = CompileCounter()

    def step(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = cache.append(key, value)
        return keys.sum(2), 2 * values.sum(2)

    function = torch.compile(step, fullgraph=True, backend=counter)
    for count in [first, *[1] * 10]:
        key, value = tokens(draw, count)
        found = function(key, value)
        keys, values = plain.append(key, value)
        torch.testing.assert_close(found, (keys.sum(2), 2 * values.sum(2)))
        assert cache.length == plain.length
    assert same(cache, plain)
    assert counter.frame_count <= MOST_GRAPHS


def test_compiles_with_truncate_and_reset() -> None:
    torch._dynamo.reset()
    draw, cache = Draw(), new()

    def step(key: Tensor, value: Tensor) -> Tensor:
        cache.reset()
        cache.append(key, value)
        cache.truncate(2)
        return cache.append(key, value)[0] + 1

    key, value = tokens(draw, 3)
    found = torch.compile(step, fullgraph=True, backend="eager")(key, value)
    assert torch.equal(found, torch.cat([key[:, :, :2], key], dim=2) + 1)
    assert cache.length == 5

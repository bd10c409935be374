"""RotaryEmbedding against complex numbers written by hand, at far positions, and in every tool."""

from __future__ import annotations

import cmath
import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from mha_lib import RotaryEmbedding
from tests.support import DEVICES, ROUNDED_ONCE, Draw, assert_near, by_dtype, draws
from tests.tolerances import HAND_WRITTEN, MODULE, Tolerance

TURNED = Tolerance(0, 1e-6)
"""Cosine and sine are float32, each rounded by 6e-8, on numbers below 5; angles are those of the formula, bit for bit.
"""

RELATIVE = Tolerance(1e-5, 1e-5)
"""Scores at positions up to 60: angles are rounded by 2e-6 radians, on sums of eight products around 1."""

COMPILED = Tolerance(1e-6, 1e-6)
"""Compiled cosines and sines of float32 may differ in the last place."""

TURNED_IN_HALF = by_dtype(
    {"bfloat16": Tolerance(2**-8 + 1e-5, 1e-5), "float16": Tolerance(2**-11 + 1e-5, 1e-5)}
)
"""Turned in float32 and rounded once, half a unit in the last place."""

B, H, N, D = 2, 3, 5, 8
LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def as_float32(number: float) -> float:
    """The nearest float32."""
    return float(torch.tensor(number, dtype=torch.float64).float())


def by_hand(
    x: Tensor,
    offsets: list[int],
    *,
    dim: int,
    interleaved: bool,
    base: float = 10000.0,
    frequencies: list[float] | None = None,
) -> Tensor:
    """Each pair of features as one Python number, multiplied by another; frequencies and angles are float32."""
    if frequencies is None:
        frequencies = [as_float32(base ** (-2 * m / dim)) for m in range(dim // 2)]
    result = x.clone()
    for sample, offset in enumerate(offsets):
        for position in range(x.shape[2]):
            for m, frequency in enumerate(frequencies):
                turn = cmath.rect(1.0, as_float32((offset + position) * frequency))
                one, other = (2 * m, 2 * m + 1) if interleaved else (m, m + dim // 2)
                for head in range(x.shape[1]):
                    place = x[sample, head, position]
                    turned = complex(float(place[one]), float(place[other])) * turn
                    result[sample, head, position, one] = turned.real
                    result[sample, head, position, other] = turned.imag
    return result


@LAYOUTS
@pytest.mark.parametrize("dim", [2, 4, 6, 8])
@pytest.mark.parametrize("offset", [0, 3, -2, 1000])
def test_equals_complex_numbers(interleaved: bool, dim: int, offset: int) -> None:
    x = Draw(1).normal(B, H, N, D)
    got = RotaryEmbedding(dim, interleaved=interleaved)(x, offset)
    assert_near(got, by_hand(x, [offset] * B, dim=dim, interleaved=interleaved), TURNED)
    assert torch.equal(got[..., dim:], x[..., dim:])


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8])
def test_an_offset_for_each_sample(interleaved: bool, dtype: torch.dtype) -> None:
    x, offsets = Draw(2).normal(3, H, N, D), [120, 0, -7]
    rotary = RotaryEmbedding(D, interleaved=interleaved)
    got = rotary(x, torch.tensor(offsets, dtype=dtype))
    assert_near(got, by_hand(x, offsets, dim=D, interleaved=interleaved), TURNED)
    for index, offset in enumerate(offsets):
        assert torch.equal(got[index], rotary(x[index : index + 1], offset)[0])


def test_the_offset_is_zero_if_it_is_not_given() -> None:
    x, rotary = Draw(3).normal(B, H, N, D), RotaryEmbedding(D)
    assert torch.equal(rotary(x), rotary(x, 0))
    assert torch.equal(rotary(x), rotary(x, offset=0))
    assert torch.equal(rotary(x)[:, :, 0], x[:, :, 0])


@LAYOUTS
def test_base_and_frequencies(interleaved: bool) -> None:
    x = Draw(4).normal(B, H, N, D)
    options: dict[str, Any] = {"dim": D, "interleaved": interleaved}
    got = RotaryEmbedding(**options, base=500.0)(x, 2)
    assert_near(got, by_hand(x, [2] * B, **options, base=500.0), TURNED)
    frequencies = [1.0, -0.5, 0.25, 0.0]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        given = torch.tensor(frequencies, dtype=dtype, requires_grad=True)
        rotary = RotaryEmbedding(**options, frequencies=given)
        assert_near(rotary(x, 2), by_hand(x, [2] * B, **options, frequencies=frequencies), TURNED)
        assert not rotary.frequencies.requires_grad


def test_frequencies_are_copied() -> None:
    x, given = Draw(5).normal(B, H, N, D), torch.ones(D // 2)
    rotary = RotaryEmbedding(D, frequencies=given)
    before = rotary(x)
    given.zero_()
    assert torch.equal(rotary(x), before)


def test_random_sizes() -> None:
    for draw in draws():
        sizes = draw.size(0, 3), draw.size(1, 3), draw.size(0, 4), draw.size(2, 9)
        dim = 2 * draw.size(1, sizes[-1] // 2)
        x, offset, interleaved = draw.normal(*sizes), draw.size(-50, 50), bool(draw.size(0, 1))
        got = RotaryEmbedding(dim, interleaved=interleaved)(x, offset)
        wanted = by_hand(x, [offset] * sizes[0], dim=dim, interleaved=interleaved)
        assert_near(got, wanted, TURNED)


@LAYOUTS
def test_scores_depend_on_the_distance_alone(interleaved: bool) -> None:
    draw = Draw(6)
    rotary = RotaryEmbedding(D, interleaved=interleaved)
    query, key = draw.normal(B, H, N, D), draw.normal(B, H, N, D)
    scores = rotary(query) @ rotary(key).mT
    for shift in (1, -20, 55):
        assert_near(rotary(query, shift) @ rotary(key, shift).mT, scores, RELATIVE)
    each = torch.tensor([3, -40])
    assert_near(rotary(query, each) @ rotary(key, each).mT, scores, RELATIVE)
    assert (rotary(query, 1) @ rotary(key).mT - scores).abs().max() > 0.1


@LAYOUTS
def test_lengths_stay(interleaved: bool) -> None:
    x, rotary = Draw(7).normal(B, H, N, D), RotaryEmbedding(D, interleaved=interleaved)
    assert_near(rotary(x, 77).norm(dim=-1), x.norm(dim=-1), TURNED)


@LAYOUTS
@pytest.mark.parametrize("dim", [4, 8])
def test_the_gradient_is_turned_back(interleaved: bool, dim: int) -> None:
    draw = Draw(8)
    rotary = RotaryEmbedding(dim, interleaved=interleaved)
    back = RotaryEmbedding(dim, interleaved=interleaved, frequencies=-rotary.frequencies)
    x, upstream = draw.normal(B, H, N, D, grad=True), draw.normal(B, H, N, D)
    (found,) = torch.autograd.grad(rotary(x, 9), x, upstream)
    assert_near(found, back(upstream, 9), HAND_WRITTEN)
    assert torch.autograd.gradcheck(lambda x: rotary(x, torch.tensor([4, -1])), x)


def converted(rotary: RotaryEmbedding, how: str) -> nn.Module:
    model = nn.Sequential(rotary, nn.Linear(2, 2))
    steps: dict[str, Callable[[], nn.Module]] = {
        "as it is": lambda: model,
        "bfloat16": model.bfloat16,
        "half": model.half,
        "double": model.double,
        "to": lambda: model.to(dtype=torch.bfloat16),
        "twice": lambda: model.half().float(),
        "empty": lambda: model.to_empty(device="cpu"),
        "meta and back": lambda: model.to("meta").to_empty(device="cpu").bfloat16(),
    }
    steps[how]()
    return model[0]


@pytest.mark.parametrize(
    "how", ["as it is", "bfloat16", "half", "double", "to", "twice", "empty", "meta and back"]
)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_far_positions_keep_float32_angles(how: str, autocast: bool) -> None:
    far = 100_000
    x = Draw(9).normal(1, 1, 3, D)
    rotary = converted(RotaryEmbedding(D), how)
    wanted = by_hand(x, [far], dim=D, interleaved=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for dtype, tolerance in (
            (torch.float64, TURNED),
            (torch.float32, TURNED),
            *TURNED_IN_HALF.items(),
        ):
            given = x.to(dtype)
            got = rotary(given, far)
            assert got.dtype == dtype
            same = by_hand(given.double(), [far], dim=D, interleaved=False)
            assert_near(got, same, tolerance)
            assert_near(rotary(given, torch.tensor([far])), same, tolerance)
    assert_near(rotary(x, far), wanted, TURNED)


@pytest.mark.parametrize("dtype", ROUNDED_ONCE, ids=str)
@pytest.mark.parametrize("dim", [4, 8])
def test_the_output_has_the_dtype_of_the_input(dtype: torch.dtype, dim: int) -> None:
    x = Draw(10).normal(B, H, N, D, dtype=dtype, grad=True)
    output = RotaryEmbedding(dim)(x, torch.tensor([0, 5]))
    assert output.dtype == dtype
    assert output.shape == x.shape
    (gradient,) = torch.autograd.grad(output.sum(), x)
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()


def test_nothing_is_stored_and_nothing_is_trained() -> None:
    rotary = RotaryEmbedding(D)
    assert rotary.state_dict() == {}
    assert list(rotary.parameters()) == []
    assert list(rotary.buffers()) == []
    rotary.load_state_dict({}, strict=True)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_and_files(how: str) -> None:
    x = Draw(11).normal(B, H, N, D)
    rotary = RotaryEmbedding(6, interleaved=True, frequencies=torch.tensor([0.3, 0.2, 0.1]))
    wanted = rotary(x, 4)
    if how == "save":
        file = io.BytesIO()
        torch.save(rotary, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copy.deepcopy(rotary) if how == "deepcopy" else pickle.loads(pickle.dumps(rotary))
    assert torch.equal(twin(x, 4), wanted)
    twin.frequencies.zero_()
    assert torch.equal(rotary(x, 4), wanted)


def test_the_meta_device_and_back() -> None:
    x = Draw(12).normal(B, H, N, D)
    wanted = RotaryEmbedding(D)(x, 3)
    with torch.device("meta"):
        made_there = RotaryEmbedding(D)
    sent_there = RotaryEmbedding(D).to("meta")
    for rotary in (made_there, sent_there):
        assert rotary(x.to("meta"), 3).shape == x.shape
        assert rotary(x.to("meta"), 3).is_meta
        for back in (rotary, copy.deepcopy(rotary).to_empty(device="cpu")):
            assert torch.equal(back(x, 3), wanted)


@pytest.mark.parametrize("device", [device for device in DEVICES if device != "meta"])
def test_moving_to_a_device_and_back(device: str) -> None:
    x, rotary = Draw(13).normal(B, H, N, D), RotaryEmbedding(D)
    wanted = rotary(x, 3)
    assert_near(rotary(x.to(device), 3).cpu(), wanted, TURNED)
    rotary.to(device)
    assert rotary.frequencies.device.type == device
    assert_near(rotary(x.to(device), 3).cpu(), wanted, TURNED)
    assert_near(rotary(x, 3), wanted, TURNED)
    assert rotary.cpu().frequencies.device.type == "cpu"


@pytest.mark.parametrize(("interleaved", "each"), [(False, False), (True, True)])
def test_compiles_once_for_all_lengths_and_offsets(interleaved: bool, each: bool) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    draw, rotary = Draw(14), RotaryEmbedding(6, interleaved=interleaved)
    counter = CompileCounter()
    function = torch.compile(rotary, fullgraph=True, dynamic=True, backend=counter)
    for length, offset in ((7, 13), (4, 6), (5, 2), (9, 30)):
        x = draw.normal(B, H, length, D)
        given: Any = torch.tensor([offset, -offset]) if each else offset
        assert_near(function(x, given), rotary(x, given), COMPILED)
    assert counter.frame_count == 1


def test_compiles_with_its_gradient() -> None:
    torch._dynamo.reset()
    draw, rotary = Draw(15), RotaryEmbedding(D)
    function = torch.compile(rotary, fullgraph=True, backend="aot_eager")
    x, upstream = draw.normal(B, H, N, D, grad=True), draw.normal(B, H, N, D)
    got = torch.autograd.grad(function(x, 3), x, upstream)
    wanted = torch.autograd.grad(rotary(x, 3), x, upstream)
    assert_near(got[0], wanted[0], COMPILED)


def test_exports() -> None:
    x, rotary = Draw(16).normal(B, H, N, D), RotaryEmbedding(6)
    shapes = ({2: torch.export.Dim("sequence", min=2, max=64)},)
    program = torch.export.export(rotary, (x,), dynamic_shapes=shapes, strict=False).module()
    longer = Draw(17).normal(B, H, 2 * N, D)
    assert_near(program(longer), rotary(longer), COMPILED)


@LAYOUTS
def test_vmap_and_grad(interleaved: bool) -> None:
    draw = Draw(18)
    rotary = RotaryEmbedding(6, interleaved=interleaved)
    x, offsets = draw.normal(4, B, H, N, D), torch.tensor([[0, 1], [5, -3], [2, 2], [9, 0]])
    for got, one in zip(vmap(rotary)(x), x, strict=True):
        assert_near(got, rotary(one), MODULE)
    for got, one, offset in zip(vmap(rotary)(x, offsets), x, offsets, strict=True):
        assert_near(got, rotary(one, offset), MODULE)
    found = vmap(grad(lambda one: rotary(one, 3).pow(3).sum()))(x)
    for got, one in zip(found, x, strict=True):
        leaf = one.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(rotary(leaf, 3).pow(3).sum(), leaf)
        assert_near(got, wanted, MODULE)


def test_representation() -> None:
    assert repr(RotaryEmbedding(4)) == "RotaryEmbedding(dim=4, base=10000.0, interleaved=False)"

"""With a CUDA device: the library computes there what it computes on the CPU, and the book runs on it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from mha_lib import (
    KVCache,
    MultiHeadAttention,
    RotaryEmbedding,
    SimpleMultiHeadAttention,
    alibi_bias,
    causal_mask,
    diagnose,
    padding_mask,
)
from tests.support import ROOT, Draw, assert_near
from tests.tolerances import MODULE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_the_library_on_cuda() -> None:
    draw = Draw()
    simple = SimpleMultiHeadAttention(12, 3).double()
    x, lengths = draw.normal(2, 5, 12), torch.tensor([5, 3])
    on_cpu = {
        "mask": causal_mask(5, 5) & padding_mask(lengths, 5),
        "bias": alibi_bias(3, 5, 5, dtype=torch.float64),
    }
    on_gpu = {
        "mask": causal_mask(5, 5, device="cuda") & padding_mask(lengths.cuda(), 5),
        "bias": alibi_bias(3, 5, 5, dtype=torch.float64, device="cuda"),
    }
    wanted = [simple(x, **on_cpu), simple.split()(x, **on_cpu)]
    simple.cuda()
    for module, expected in zip((simple, simple.split()), wanted, strict=True):
        output = module(x.cuda(), **on_gpu)
        assert output.is_cuda
        assert_near(output.cpu(), expected, MODULE)


def test_the_finished_module_on_cuda() -> None:
    draw = Draw()
    module = MultiHeadAttention(
        12, 3, num_kv_heads=1, causal=True, window=4, rotary=RotaryEmbedding(4), sinks=True
    ).double()
    x = draw.normal(2, 7, 12)
    expected = module(x)
    module.cuda()
    assert_near(module(x.cuda()).cpu(), expected, MODULE)
    cache = KVCache(2, 1, 4, max_length=7, device="cuda", dtype=torch.float64)
    with torch.no_grad():
        steps = [module(x[:, n : n + 1].cuda(), cache=cache) for n in range(7)]
    assert_near(torch.cat(steps, dim=1).cpu(), expected, MODULE)


def test_the_doctor_on_cuda() -> None:
    module = SimpleMultiHeadAttention(12, 3, causal=True).cuda()
    assert diagnose(module, 12, 3, causal=True).verified
    names = [finding.name for finding in diagnose(module, 12, 3).findings]
    assert names == ["ignores_future"]
    assert next(module.parameters()).is_cuda


def test_the_book_on_cuda() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "book"],
        cwd=ROOT,
        env={**os.environ, "MHA_BOOK_DEVICE": "cuda"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    notebooks = list((ROOT / "book").glob("*.ipynb"))
    assert done.stdout.count("used CUDA PASSED") == len(notebooks)

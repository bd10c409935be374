"""Heads spread over two processes by PyTorch's own ``parallelize_module`` equal one process, forward and gradient.

Run as ``python -m tests.tensor_parallel FILE``; the two processes meet at FILE, which must not exist.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.multiprocessing.spawn import spawn

from mha_lib import KVCache, MultiHeadAttention, RotaryEmbedding
from tests.support import Draw, assert_near
from tests.tolerances import MODULE

PROCESSES = 2
B, N, E, H, K, D = 2, 5, 10, 4, 2, 6
PLAN = {
    "q_proj": ColwiseParallel(),
    "k_proj": ColwiseParallel(),
    "v_proj": ColwiseParallel(),
    "out_proj": RowwiseParallel(),
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped, rotary, normed": {
        "num_kv_heads": K,
        "causal": True,
        "rotary": RotaryEmbedding(D),
        "qk_norm": nn.RMSNorm,
    },
    "sinks": {"num_kv_heads": K, "sinks": True, "softcap": 2.0},
}


def build(**options: Any) -> MultiHeadAttention:
    """The same module in every process."""
    draw = Draw(1)
    module = MultiHeadAttention(E, H, head_dim=D, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(draw.normal(*parameter.shape) / 3)
    return module


def whole(x: Tensor | None) -> Tensor:
    """A gradient, put together again where it is spread."""
    assert x is not None
    return x.full_tensor() if isinstance(x, DTensor) else x


def compare(options: dict[str, Any]) -> None:
    """One module on one process, the same on all of them together."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    single, spread = build(**options), build(**options)
    parallelize_module(spread, mesh, PLAN)
    if spread.sinks is not None:
        spread.sinks = nn.Parameter(distribute_tensor(spread.sinks.detach(), mesh, [Shard(0)]))
    assert len(spread.q_proj(torch.zeros(1, 1, E).double())[0, 0]) == H * D // PROCESSES

    draw = Draw(2)
    x, upstream = draw.normal(B, N, E, grad=True), draw.normal(B, N, E)
    same = x.detach().clone().requires_grad_()
    wanted, got = single(x), spread(same)
    assert_near(got, wanted, MODULE)
    torch.autograd.backward(wanted, upstream)
    torch.autograd.backward(got, upstream)
    assert_near(whole(same.grad), whole(x.grad), MODULE)
    expected = dict(single.named_parameters())
    for name, parameter in spread.named_parameters():
        found = whole(parameter.grad)
        if name.endswith("norm.weight"):  # each process has the gradient of its own heads
            dist.all_reduce(found)
        assert_near(found, whole(expected[name].grad), MODULE)
    with torch.no_grad():
        generate(spread, single, x.detach())


def generate(spread: MultiHeadAttention, single: MultiHeadAttention, x: Tensor) -> None:
    """Each process caches the keys and values of its own heads."""
    heads = single.num_kv_heads // PROCESSES
    cache = KVCache(B, heads, D, max_length=N, dtype=torch.float64)
    plain = KVCache(B, single.num_kv_heads, D, max_length=N, dtype=torch.float64)
    for part in (x[:, :3], x[:, 3:4], x[:, 4:]):
        assert_near(spread(part, cache=cache), single(part, cache=plain), MODULE)


def work(rank: int, meeting: str) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=Path(meeting).as_uri(), rank=rank, world_size=PROCESSES
    )
    try:
        for options in CASES.values():
            compare(options)
    finally:
        dist.destroy_process_group()


def main() -> None:
    """Start the processes and wait for them."""
    meeting = str(Path(sys.argv[1]).resolve())
    spawn(work, args=(meeting,), nprocs=PROCESSES)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()

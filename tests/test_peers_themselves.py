"""Every peer can be built, and maps tokens to tokens: before the doctor sees it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.peers import DISPUTED, PEERS, Peer
from tests.support import ROOT, Draw

EVERY = PEERS + DISPUTED


def dtype_of(candidate: Any) -> torch.dtype:
    """That of the first module found: the candidate, or one in its closure."""
    cells = [cell.cell_contents for cell in getattr(candidate, "__closure__", None) or ()]
    modules = (one for one in [candidate, *cells] if isinstance(one, nn.Module))
    return next((next(module.parameters()).dtype for module in modules), torch.float32)


def answer(candidate: Any, x: Tensor, *mask: Tensor) -> Any:
    """Self-attention, also by what takes query, key and value."""
    if isinstance(candidate, nn.Module):
        candidate.eval()
        required = inspect.signature(candidate.forward).parameters.values()
        if (
            sum(
                each.default is each.empty and each.kind != each.VAR_POSITIONAL for each in required
            )
            > 2
        ):
            return candidate(x, x, x)
    return candidate(x, *mask)


def test_names_are_unique() -> None:
    assert len({peer.name for peer in EVERY}) == len(EVERY)


@pytest.mark.parametrize("peer", EVERY, ids=lambda peer: peer.name)
@pytest.mark.parametrize("shape", [(2, 5), (1, 1), (3, 17)], ids=str)
def test_tokens_to_tokens(peer: Peer, shape: tuple[int, int]) -> None:
    candidate = peer.build()
    x = Draw().normal(*shape, peer.arguments["embed_dim"], dtype=dtype_of(candidate))
    mask = [torch.ones(shape, dtype=torch.bool)] * bool(peer.arguments.get("takes_mask"))
    output = answer(candidate, x, *mask)
    output = output[0] if isinstance(output, tuple) else output
    assert (output.shape, output.dtype) == (x.shape, x.dtype)
    assert output.isfinite().all()


def test_the_list_loads_nothing_else() -> None:
    """Other packages come with the peers that need them, and timm leaves no half of itself behind."""
    code = """
import sys
from tests.peers import PEERS
late = ["transformers", "x_transformers", "timm", "torchvision"]
assert not set(late) & set(sys.modules)
next(peer for peer in PEERS if peer.name == "timm: Attention").build()
assert not [name for name in sys.modules if name.split(".")[0] in late]
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

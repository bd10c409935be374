"""What several test modules share: seeded tensors, devices, the number of random draws."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tests import tolerances
from tests.tolerances import Tolerance

torch.set_num_threads(1)  # tensors here are small: a second thread would cost more than it brings

ROOT = Path(__file__).parent.parent
DRAWS = int(os.environ.get("MHA_DRAWS", "10"))
DEVICES = ["cpu", "meta"] + ["cuda"] * torch.cuda.is_available()


def by_dtype(table: dict[str, Tolerance]) -> dict[torch.dtype, Tolerance]:
    """The table with torch's dtypes in place of their names; the table itself does without torch."""
    return {getattr(torch, name): tolerance for name, tolerance in table.items()}


FORWARD = by_dtype(tolerances.FORWARD)
BACKWARD = by_dtype(tolerances.BACKWARD)
ROUNDED_ONCE = by_dtype(tolerances.ROUNDED_ONCE)


class Draw:
    """Random tensors and sizes from one seed; the numbers are drawn on the CPU."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.sizes = random.Random(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
        """Normally distributed numbers."""
        numbers = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return numbers.to(dtype).requires_grad_(grad)

    def mask(self, *shape: int) -> Tensor:
        """A random mask in which every row may attend to its first key."""
        mask = torch.rand(shape, generator=self.generator) < 0.6
        mask[..., :1] = True
        return mask

    def size(self, low: int, high: int) -> int:
        """A random size, both ends included."""
        return self.sizes.randint(low, high)


def draws() -> Iterator[Draw]:
    """One source of random numbers for each draw that the run asks for."""
    return (Draw(seed) for seed in range(DRAWS))


def assert_near(actual: Tensor, expected: Tensor, tolerance: Tolerance) -> None:
    """Compare in float64."""
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=tolerance.rtol, atol=tolerance.atol
    )

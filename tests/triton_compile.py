"""Compile the Triton kernels for a GPU that need not be there, and see that their tiles fit its shared memory.

Usage: python -m tests.triton_compile 90 some|all
"""

from __future__ import annotations

import sys
from itertools import product
from typing import Any

import torch

SHARED_MEMORY = {75: 64 * 1024, 80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}
"""Bytes that one block may have on a T4, A100, RTX 3090 and H100, by compute capability."""

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


def compiled(
    kernel: Any, capability: int, *, dtype: torch.dtype, launch: Any, constants: dict[str, Any]
) -> Any:
    """Compile as a launch with aligned tensors does."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    aligned: dict[tuple[int], list[list[Any]]] = {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in ("logsumexp", "delta"):
            signature[name] = "*fp64" if dtype == torch.float64 else "*fp32"
        elif name == "offsets":
            signature[name] = "*i64"
        elif name in ("h", "group", "i", "j", "low", "high"):
            signature[name] = "i32"
        elif name == "scale":
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if name[-2:-1] == "_" else "*" + TYPES[dtype]
        if signature[name].startswith("*") or name[-2:-1] == "_":
            aligned[(position,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    source = ASTSource(kernel, signature, places, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def check(capability: int, dtype: torch.dtype, width: int, open_sides: tuple[str, ...]) -> None:
    """Compile the three kernels for one head dimension."""
    from mha_lib import triton_kernel as kernels

    room = SHARED_MEMORY[capability]
    launches = kernels._launches(width, width, dtype, room)
    names = ("_forward_kernel", "_query_gradient_kernel", "_key_gradient_kernel")
    for name, launch in zip(names, launches, strict=True):
        tiles = ("QUERIES", "KEYS") if name != "_key_gradient_kernel" else ("KEYS", "QUERIES")
        constants = {
            **dict.fromkeys(("D", "V", "PADDED_D", "PADDED_V"), width),
            **dict(zip(tiles, launch[:2], strict=True)),
            **dict.fromkeys(open_sides),
        }
        binary = compiled(
            getattr(kernels, name), capability, dtype=dtype, launch=launch, constants=constants
        )
        case = f"{name} sm_{capability} {TYPES[dtype]} {width} {tuple(launch)}"
        print(f"{case}: {binary.metadata.shared} of {room} bytes", flush=True)
        assert binary.asm["cubin"].startswith(b"\x7fELF"), case
        assert binary.metadata.shared <= room, case


def main(capability: int, extent: str) -> None:
    """Compile a few cases, or all of them."""
    causal, both, offsets = ("low", "offsets"), ("offsets",), ("low",)
    if extent == "all":
        for dtype, width, sides in product(TYPES, (16, 32, 64, 128, 256), (causal, both, offsets)):
            refused = dtype == torch.float64 or (dtype == torch.float32 and width > 128)
            if not refused:
                check(capability, dtype, width, sides)
    elif capability == 75:
        check(capability, torch.float16, 64, causal)
    else:
        check(capability, torch.float16, 32, both)
        check(capability, torch.bfloat16, 64, offsets)
        check(capability, torch.bfloat16, 128, causal)
        check(capability, torch.float32, 64, causal)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

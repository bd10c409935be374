"""What a specimen of the zoo is, and how a broken class becomes one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mha_lib import RotaryEmbedding
from tests import zoo_styles as styles
from tests.zoo_styles import matrices

Build = Callable[[], Any]
Wrap = Callable[[Any], Any]
Class = TypeVar("Class", bound=type[nn.Module])
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Specimen:
    """A candidate with a known mistake.

    Attributes:
        bug: Name of the finding that is expected.
        style: Whose code it imitates, and its own name.
        build: Makes the candidate; the numbers are the same each time.
        arguments: All that ``diagnose`` gets besides the candidate.
        also: Names of further findings that are expected, where there are two mistakes.
        right: Makes the same candidate without the mistake, or None.
    """

    bug: str
    style: str
    build: Build
    arguments: dict[str, Any]
    also: frozenset[str] = frozenset()
    right: Build | None = None

    @property
    def name(self) -> str:
        """The identifier for a test."""
        size = f"{self.arguments['embed_dim']}x{self.arguments['num_heads']}"
        return f"{'+'.join([self.bug, *sorted(self.also)])}-{self.style}-{size}"


SPECIMENS: list[Specimen] = []

STYLES: dict[type[nn.Module], tuple[str, bool]] = {
    styles.FlashSelfAttention: ("sdpa", True),
    styles.GPT2Attention: ("conv1d", True),
    styles.CausalSelfAttention: ("nanogpt", True),
    styles.MultiHeadAttention: ("textbook", False),
    styles.MultiHeadedAttention: ("annotated", False),
    styles.SelfAttention: ("video", False),
    styles.BertSelfAttention: ("bert", False),
    styles.BertAttention: ("bert_whole", False),
    styles.RaschkaAttention: ("raschka", True),
    styles.VitAttention: ("timm", False),
    styles.LocalEinopsAttention: ("local_einops", False),
    styles.EinopsAttention: ("einops", False),
    styles.MultiheadAttention: ("uva", False),
    styles.MistralAttention: ("mistral", True),
    styles.RotaryLlama: ("llama_rotary", True),
    styles.LlamaAttention: ("llama", True),
    styles.RotaryNeox: ("neox_rotary", True),
    styles.NeoxAttention: ("neox", True),
    styles.Head: ("lecture_head", True),
    styles.LectureAttention: ("lecture", True),
    styles.EncoderHead: ("encoder_head", False),
    styles.EncoderHeads: ("encoder", False),
    styles.DotProductAttention: ("d2l", False),
    styles.LabmlAttention: ("labml", False),
    styles.Lens: ("lens", True),
}
"""Name of each style, and whether it is causal; the most special class first."""

WHOLE: dict[type[nn.Module], tuple[type[nn.Module], str]] = {
    styles.Head: (styles.LectureAttention, "head"),
    styles.EncoderHead: (styles.EncoderHeads, "head"),
    styles.BertSelfAttention: (styles.BertAttention, "inner"),
}
"""Parts that are not attention themselves: the class around them, and the attribute that names the part."""


def entire(part: type[nn.Module]) -> type[nn.Module]:
    """The class to build: a head is put into the module that holds the heads."""
    for base, (whole, attribute) in WHOLE.items():
        if issubclass(part, base):
            return type(whole.__name__, (whole,), {attribute: part})
    return part


def specimen(
    bug: str,
    embed_dim: int,
    num_heads: int,
    *,
    also: Iterable[str] = (),
    options: dict[str, Any] | None = None,
    wrap: Wrap | None = None,
    seed: int = 0,
    **arguments: Any,
) -> Callable[[Class], Class]:
    """Put a class into the zoo; it is built as ``cls(embed_dim, num_heads, **options)`` and then wrapped."""

    def register(cls: Class) -> Class:
        base = next((style for style in STYLES if issubclass(cls, style)), None)
        style, causal = ("own", False) if base is None else STYLES[base]

        def builder(which: type[nn.Module]) -> Build:
            def build() -> Any:
                torch.manual_seed(seed)
                candidate = entire(which)(embed_dim, num_heads, **(options or {}))
                return candidate if wrap is None else wrap(candidate)

            return build

        if issubclass(cls, styles.Lens):
            with torch.random.fork_rng(devices=[]):
                arguments["weights"] = builder(cls)().matrices()
        SPECIMENS.append(
            Specimen(
                bug,
                f"{style}-{cls.__name__}",
                builder(cls),
                {"embed_dim": embed_dim, "num_heads": num_heads, "causal": causal, **arguments},
                frozenset(also),
                None if base is None else builder(base),
            )
        )
        return cls

    return register


def function(
    bug: str,
    embed_dim: int,
    num_heads: int,
    *,
    also: Iterable[str] = (),
    bias: bool = False,
    **arguments: Any,
) -> Callable[[Function], Function]:
    """Put a function ``f(x, w, num_heads)`` over a dictionary of matrices into the zoo."""

    def register(wrong: Function) -> Function:
        kv_heads = arguments.get("num_kv_heads") or num_heads
        w = matrices(embed_dim, kv_heads * embed_dim // num_heads, bias=bias, seed=len(SPECIMENS))

        def builder(f: Callable[..., Any]) -> Build:
            def candidate(x: Tensor, *mask: Tensor) -> Any:
                return f(x, w, num_heads, *mask)

            return lambda: candidate

        SPECIMENS.append(
            Specimen(
                bug,
                f"function-{wrong.__name__}",
                builder(wrong),
                {"embed_dim": embed_dim, "num_heads": num_heads, "weights": w, **arguments},
                frozenset(also),
                builder(styles.attention_function) if not arguments.get("takes_mask") else None,
            )
        )
        return wrong

    return register


def as_self_attention(module: nn.Module) -> Any:
    """What a reader writes in order to call a module that wants three inputs."""
    return lambda x: module(x, x, x)


def as_masked(module: nn.Module) -> Any:
    """The same with a mask."""
    return lambda x, mask: module(x, x, x, mask)


def without_mask(module: nn.Module) -> Any:
    """The same for a module that always wants a mask."""
    return lambda x: module(x, x, x, None)


MEANT: dict[type[nn.Module], dict[str, Any]] = {
    styles.LocalEinopsAttention: {"window": 3},
    styles.MistralAttention: {"window": 3},
    styles.RotaryLlama: {"rotary": RotaryEmbedding(12, interleaved=True)},
    styles.RotaryNeox: {"rotary": RotaryEmbedding(12)},
}
"""What the right ones mean besides causal or not."""

MASKED = (
    styles.MultiHeadAttention,
    styles.MultiHeadedAttention,
    styles.BertAttention,
    styles.EinopsAttention,
)
GROUPED = {styles.LlamaAttention: "n_kv_heads", styles.RotaryNeox: "num_kv_heads"}


def right_one(
    cls: type[nn.Module], note: str = "", options: dict[str, Any] | None = None, **arguments: Any
) -> Specimen:
    """A style without a mistake."""
    style, causal = STYLES[cls]

    def build() -> Any:
        torch.manual_seed(1)
        module = cls(48, 4, **(options or {}))
        return without_mask(module) if cls is styles.SelfAttention else module

    meant = {"causal": causal, **MEANT.get(cls, {}), **arguments}
    if cls is styles.Lens:
        with torch.random.fork_rng(devices=[]):
            meant["weights"] = build().matrices()
    name = f"{style}-{cls.__name__}{note}"
    return Specimen("", name, build, {"embed_dim": 48, "num_heads": 4, **meant})


RIGHT = [right_one(cls) for cls in STYLES if cls not in WHOLE]
RIGHT += [right_one(cls, "-masked", takes_mask=True) for cls in MASKED]
RIGHT += [right_one(cls, "-grouped", {name: 2}, num_kv_heads=2) for cls, name in GROUPED.items()]
"""The healthy counterpart of the zoo, which must not alarm anybody."""

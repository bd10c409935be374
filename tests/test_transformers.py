"""Every architecture of transformers that looks its attention up by name, with this library's attention in it."""

from __future__ import annotations

import inspect
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import architectures
from tests.architectures import ARCHITECTURES, LENGTH, NOT_REACHED, tensors, tiny_model
from tests.tolerances import Tolerance

transformers = pytest.importorskip("transformers")

from mha_lib import convert  # noqa: E402

NAME = "mha_lib"
COMPLETE = os.environ.get("MHA_ARCHITECTURES") == "all"
KINDS_OF_ARGUMENTS = (
    "bridgetower",
    "afmoe",
    "deepseek_v32",
    "diffllama",
    "doge",
    "gemma2",
    "gpt_oss",
    "granite_swa",
    "inkling2",
    "llama4",
    "longt5",
    "minimax_m3_vl",
    "mllama",
    "parakeet",
    "phi4_multimodal",
    "swin",
    "t5",
)
"""What an architecture does that few others do: always tried."""

CHOSEN = [
    name
    for number, name in enumerate(ARCHITECTURES)
    if COMPLETE or number % 5 == 0 or name in KINDS_OF_ARGUMENTS
]
LOGITS = Tolerance(1e-4, 1e-4)
"""float32 through two layers of a model whose numbers are of order one; a wrong scale or mask is 1e-2 and more."""

HALF_LOGITS = Tolerance(2**-4, 2**-4)
"""bfloat16 through two layers: some dozen roundings of 2**-9 of numbers of order one."""


class Called:
    """Counts the calls of the registered function, by class of the calling module."""

    def __init__(self) -> None:
        self.by_class: Counter[str] = Counter()

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.by_class[type(module).__name__] += 1
        return self.function(module, *args, **kwargs)

    function: Any = None


CALLED = Called()


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    """The library's function under its name, counted."""
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    convert.register_transformers(NAME)
    interface = transformers.AttentionInterface()
    CALLED.function = interface[NAME]
    transformers.AttentionInterface.register(NAME, CALLED)
    yield
    transformers.AttentionInterface.register(NAME, CALLED.function)


def use(model: Any, implementation: str) -> None:
    """Set it in every part; some hand no implementation on to their parts."""
    model.set_attn_implementation(implementation)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if implementation == "eager" and hasattr(config, "_attn_implementation_internal"):
            config._attn_implementation_internal = implementation


def run(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Every floating tensor that the model returns, attention weights left out."""
    torch.manual_seed(3)
    with torch.no_grad():
        output = model(**batch)
    return {
        name: value
        for name, value in tensors(output)
        if "attn" not in name and "attentions" not in name
    }


def first_that_fits(model: Any, padding: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Of the inputs that may fit, the first that the model takes, and what it makes of them."""
    refused: list[str] = []
    for batch in architectures.inputs(model, padding):
        try:
            return batch, run(model, batch)
        except Exception as error:  # whatever a model says to inputs that it was not made for
            refused.append(f"{type(error).__name__}: {error}")
    raise AssertionError(f"{type(model).__name__} takes none of the inputs: {refused}")


def assert_same(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: Tolerance
) -> None:
    """Equal, relative to the largest number of each tensor; NaN and infinity in the same places."""
    assert any(bool(value.isfinite().any()) for value in expected.values()), "nothing is a number"
    for name, value in expected.items():
        finite = value[value.isfinite()]
        largest = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
        torch.testing.assert_close(
            actual[name], value, rtol=0, atol=tolerance.atol * largest, equal_nan=True
        )


def built(name: str, entry: str) -> Any:
    """The tiny model of an entry: the name of a class, with ``+cross`` as a decoder with cross-attention."""
    module = architectures.load(architectures.modeling_files()[name])
    model_class = getattr(module, entry.removesuffix("+cross"))
    config = architectures.tiny_config(model_class.config_class)
    if entry.endswith("+cross"):
        config.is_decoder = config.add_cross_attention = True
    return tiny_model(model_class, config)


def test_every_architecture_is_listed() -> None:
    assert set(ARCHITECTURES) | set(NOT_REACHED) == set(architectures.modeling_files())
    assert not [name for name, entries in ARCHITECTURES.items() if not entries]
    assert len(ARCHITECTURES) >= architectures.AT_LEAST


@pytest.mark.parametrize("name", CHOSEN)
def test_an_architecture_computes_what_eager_attention_computes(name: str) -> None:
    reached: set[str] = set()
    for entry in ARCHITECTURES[name]:
        model = built(name, entry)
        CALLED.by_class.clear()
        for padding in ("right", "left", None):
            use(model, "eager")
            batch, expected = first_that_fits(model, padding)
            use(model, NAME)
            assert_same(run(model, batch), expected, LOGITS)
            if "attention_mask" not in batch:
                break
        assert CALLED.by_class, f"{entry} does not call the registered function"
        reached |= set(CALLED.by_class)
    module = architectures.load(architectures.modeling_files()[name])
    missed = architectures.attention_modules(module) - reached
    assert missed == set(NOT_REACHED.get(name, {}))


def test_the_comparison_notices_other_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(module: nn.Module, query: Tensor, *rest: Any, **options: Any) -> Any:
        return right(module, query * 1.1, *rest, **options)

    right = CALLED.function
    monkeypatch.setattr(CALLED, "function", wrong)
    for name in ("bert", "gemma2", "llama", "t5", "vit"):
        model = built(name, ARCHITECTURES[name][0])
        batch, expected = first_that_fits(model, "right")
        use(model, NAME)
        with pytest.raises(AssertionError):
            assert_same(run(model, batch), expected, LOGITS)


# ---------------------------------------------------------------- some families more closely

FAMILIES = {
    "bert": "BertForMaskedLM",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "t5": "T5ForConditionalGeneration",
}
WEIGHING = [name for name in FAMILIES if name != "gpt2"]
"""gpt2 keeps from the function that weights are wanted; without them no fused kernel could be used."""

GENERATING = [name for name in FAMILIES if name != "bert"]


def family(name: str) -> tuple[Any, dict[str, Any]]:
    """The tiny model of a family and inputs for it."""
    model = built(name, FAMILIES[name])
    use(model, "eager")
    return model, first_that_fits(model, "left")[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_eager_attention(name: str) -> None:
    model, batch = family(name)
    gradients: list[dict[str, Tensor]] = []
    for implementation in ("eager", NAME):
        use(model, implementation)
        model.zero_grad()
        logits = model(**batch).logits
        if logits.shape[1] == LENGTH:  # no loss counts the rows of padding
            logits = logits[batch["attention_mask"].bool()]
        logits.square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[1].keys() == gradients[0].keys()
    assert_same(gradients[1], gradients[0], LOGITS)


@pytest.mark.parametrize("name", WEIGHING)
def test_the_weights_are_those_of_eager_attention(name: str) -> None:
    model, batch = family(name)
    weights = []
    for implementation in ("eager", NAME):
        use(model, implementation)
        with torch.no_grad():
            output = model(**batch, output_attentions=True)
        weights.append({n: v for n, v in tensors(output) if "attentions" in n})
    assert weights[0]
    assert weights[1].keys() == weights[0].keys()
    assert_same(weights[1], weights[0], LOGITS)


@pytest.mark.parametrize("name", GENERATING)
def test_generation_with_a_cache_gives_the_same_tokens(name: str) -> None:
    model, batch = family(name)
    batch = {n: v for n, v in batch.items() if n in ("input_ids", "attention_mask")}
    model.generation_config.decoder_start_token_id = 0
    tokens = []
    for implementation in ("eager", NAME):
        use(model, implementation)
        tokens.append(
            model.generate(
                **batch, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=True
            )
        )
    assert torch.equal(tokens[0], tokens[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_training_drops_weights_and_evaluation_does_not(name: str) -> None:
    model, batch = family(name)
    use(model, NAME)
    assert_same(run(model, batch), run(model, batch), Tolerance(0, 0))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    if name == "t5":
        for module in model.modules():
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
    calm = run(model, batch)
    assert_same(calm, run(model.eval(), batch), LOGITS)
    model.train()
    for module in model.modules():
        if type(module).__name__ in CALLED.by_class:
            for attribute in ("attention_dropout", "dropout", "attn_dropout"):
                value = getattr(module, attribute, None)
                if isinstance(value, nn.Dropout):
                    value.p = 0.5
                elif isinstance(value, float):
                    setattr(module, attribute, 0.5)
    dropped = run(model, batch)["." + "logits"]
    assert dropped.isfinite().all()
    assert float((dropped - calm[".logits"]).abs().max()) > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_stays_close_to_eager(name: str) -> None:
    model, batch = family(name)
    model.bfloat16()
    expected = run(model, batch)[".logits"]
    use(model, NAME)
    actual = run(model, batch)[".logits"]
    assert actual.dtype == torch.bfloat16
    assert_same({"logits": actual.float()}, {"logits": expected.float()}, HALF_LOGITS)


def test_the_function_takes_what_the_interface_gives() -> None:
    names = list(inspect.signature(CALLED.function).parameters)
    assert names[:5] == ["module", "query", "key", "value", "attention_mask"]

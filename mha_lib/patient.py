"""Somebody's attention, made safe to call: the doctor works on a copy. Built in chapter 4 of the book."""

from __future__ import annotations

import copy
import dis
import functools
import inspect
import itertools
import random
import re
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

PUBLISHED = {"torch", "transformers", "timm", "x_transformers"}
"""Libraries whose own habits are noted, not found fault with."""


LEFT_ALONE = {"torch", "einops", "transformers", "timm", "x_transformers", "numpy", "mha_lib"}
"""Libraries whose functions are not copied: they hold no weights."""

DEPTH = 4
"""Steps from object to object after which no more modules and tensors are looked for."""


class CallError(Exception):
    """The candidate raised, or answered with something else than on its first call."""


class Patient:
    """A copy of a candidate in one dtype, called as ``patient(x)`` or ``patient(x, real)``.

    Args:
        candidate: A module or any function of tokens ``(b, n, e)``.
        causal: Whether torch's own module is to be called with a causal mask.
        dtype: What the weights of the copy are converted to; None leaves them.
        default_device: Where the candidate's own new tensors go; the default of the moment if None.
        refill: Whether parameters that are all zero get small random numbers.

    Attributes:
        owners: The modules and tensors that the copy computes with, by name.
        device: Where they are.
        dtype: Their dtype, in which tokens are handed over.
        overwrites: Whether a call has changed the tokens that it was given.
        dropped: Hooks that the copy does not have.
        refilled: Names of parameters that were all zero; the copy has small random numbers in their place.
    """

    def __init__(
        self,
        candidate: Callable[..., Any],
        *,
        causal: bool,
        dtype: torch.dtype | None = None,
        default_device: torch.device | None = None,
        refill: bool = True,
    ) -> None:
        copier = _Copier(dtype, refill)
        self.overwrites = False
        self.call = copier.copied(getattr(candidate, "_orig_mod", candidate), "")
        self.owners = copier.owners
        self.refilled, self.dropped = copier.refilled, copier.dropped
        self.causal = causal
        self.default_device = default_device or torch.get_default_device()
        tensors = [t for t in copier.tensors() if t.is_floating_point()]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        numbers = Counter[torch.dtype]()
        for tensor in tensors:
            numbers[tensor.dtype] += tensor.numel()
        self.dtype = dtype or (numbers.most_common(1)[0][0] if tensors else torch.float32)
        self.arguments = _arguments_of(self.call)

    def modules(self) -> Iterator[nn.Module]:
        """The modules that the candidate is made of, without those inside of them."""
        return (owner for owner in self.owners.values() if isinstance(owner, nn.Module))

    def is_published(self) -> bool:
        """Whether the attention is a class of a well-known library: what it does differently is known there."""
        inner = (each for module in self.modules() for each in module.modules())
        return any(
            type(each).__module__.split(".")[0] in PUBLISHED and "ttention" in type(each).__name__
            for each in inner
        )

    def module_at(self, place: str) -> nn.Module | None:
        """The module of a name, if there is one."""
        for name, owner in self.owners.items():
            if isinstance(owner, nn.Module) and place.startswith(name):
                inner = owner.named_modules(prefix=name, remove_duplicate=False)
                found: dict[str, nn.Module] = dict(inner)
                if place in found:
                    return found[place]
        return None

    def norms(self) -> tuple[nn.Module, nn.Module] | None:
        """The norms of queries and keys, known by their names, if there are just two."""
        found: dict[str, list[nn.Module]] = {"q": [], "k": []}
        for module in self.modules():
            for name, inner in module.named_modules():
                letters = re.sub("[^a-z]", "", name.rsplit(".", 1)[-1].lower())
                role = re.fullmatch(
                    "(q|k)(?:uery|ey)?(?:layer)?(?:norm|ln)|(?:norm|ln)(q|k)", letters
                )
                if role and not isinstance(inner, nn.Identity):
                    found[(role.group(1) or role.group(2))].append(inner)
        if len(found["q"]) == len(found["k"]) == 1:
            return found["q"][0], found["k"][0]
        return None

    def parameters(self) -> dict[str, Tensor]:
        """What can be trained, by name."""
        found: dict[str, Tensor] = {}
        for name, owner in self.owners.items():
            if isinstance(owner, nn.Module):
                found.update(owner.named_parameters(prefix=name))
            elif isinstance(owner, Tensor):
                found[name] = owner
        return {name: each for name, each in found.items() if each.requires_grad}

    def __call__(
        self, x: Tensor, real: Tensor | None = None, *, seed: int = 0, dropout: bool = False
    ) -> Any:
        """What the candidate answers: the first element of a tuple, or whatever it is."""
        x = x.detach().to(self.device, self.dtype, copy=True)
        with ExitStack() as stack:
            stack.enter_context(unchanged_randomness(self.device))
            if self.default_device != torch.get_default_device():
                stack.enter_context(torch.device(self.default_device))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            if not dropout:
                stack.enter_context(_NoDropout())
            torch.manual_seed(seed)
            random.seed(seed)
            kept = x.clone()
            try:
                answer = first_of(self._answer(x, real))
                self.overwrites = self.overwrites or not torch.equal(x, kept)
            except (Exception, SystemExit) as error:  # a stranger's code may raise anything
                raise CallError(said(error)) from error
        return answer

    def _answer(self, x: Tensor, real: Tensor | None) -> Any:
        real = None if real is None else real.to(self.device, copy=True)
        if isinstance(self.call, nn.MultiheadAttention):
            return self._torch_answer(self.call, x, real)
        if self.arguments is None:
            return self.call(x) if real is None else self.call(x, real)
        tokens, mask = self.arguments
        return self.call(*[x] * tokens, **({} if mask is None else {mask: real}))

    def _torch_answer(self, module: nn.MultiheadAttention, x: Tensor, real: Tensor | None) -> Any:
        if not module.batch_first:
            x = x.transpose(0, 1)
        hidden = None
        if self.causal:
            size = x.shape[1 if module.batch_first else 0]
            hidden = torch.ones(size, size, dtype=torch.bool, device=x.device).triu(1)
        padded = None if real is None else ~real
        output, _ = module(x, x, x, key_padding_mask=padded, attn_mask=hidden, need_weights=False)
        return output if module.batch_first else output.transpose(0, 1)


def unregistered(module: nn.Module) -> Iterator[str]:
    """Names of attributes that hold modules or parameters in a plain list or dict, where torch does not see them."""
    known = {id(each) for each in module.parameters()}
    for place, inner in module.named_modules():
        for name, value in vars(inner).items():
            if name.startswith("_") or type(value) not in (list, tuple, dict):
                continue
            held = [*value.values()] if isinstance(value, dict) else [*value]
            tensors = [t for each in held for t in _trainable(each)]
            if any(id(tensor) not in known for tensor in tensors):
                yield f"{place}.{name}" if place else name


def _trainable(value: object) -> list[Tensor]:
    if isinstance(value, nn.Module):
        return [*value.parameters()]
    return [value] if isinstance(value, nn.Parameter) else []


def said(error: BaseException) -> str:
    """The type and the first line of an error."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # a stranger's exception may raise when it is printed
        lines = []
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def first_of(answer: Any) -> Any:
    """The first element of a tuple or of an output object of transformers."""
    if hasattr(answer, "to_tuple"):
        answer = answer.to_tuple()
    return answer[0] if isinstance(answer, tuple) and answer else answer


def _arguments_of(call: Callable[..., Any]) -> tuple[int, str | None] | None:
    """How often tokens are handed over, and under which name the mask; None for ``call(x)``, ``call(x, mask)``."""
    try:
        function = call.forward if isinstance(call, nn.Module) else call
        arguments = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [a.name for a in arguments if a.kind in kinds and a.default is a.empty]
    masks = [a.name for a in arguments if "mask" in a.name.lower()]
    masks.sort(key=lambda name: "pad" not in name.lower())
    tokens = [name for name in needed if name not in masks]
    is_triple = len(tokens) == 3 and {name[0].lower() for name in tokens} == {*"qkv"}
    second = arguments[1].name if len(arguments) > 1 else None
    if is_triple:
        return 3, masks[0] if masks else None
    by_name = isinstance(call, nn.Module) or any(a.kind is a.KEYWORD_ONLY for a in arguments)
    if by_name and len(tokens) == 1 and masks and masks[0] != second:
        return 1, masks[0]
    return None


class _NoDropout(TorchFunctionMode):
    """Switch off dropout wherever it is called, so that what else is wrong can be seen."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (F.dropout, torch.dropout):
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs.update({} if len(args) > 4 else {"dropout_p": 0.0})
        return func(*args, **kwargs)


@contextmanager
def unchanged_randomness(device: torch.device) -> Iterator[None]:
    """Leave the global random states of Python, numpy and torch as they were."""
    state, numpy = random.getstate(), sys.modules.get("numpy")
    numbers = numpy.random.get_state() if numpy else None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(state)
            if numpy:
                numpy.random.set_state(numbers)


class _Copier:
    """Copies what a candidate is made of: modules and tensors, and the functions and objects that hold them."""

    def __init__(self, dtype: torch.dtype | None, refill: bool) -> None:
        self.dtype, self.refill = dtype, refill
        self.owners: dict[str, object] = {}
        self.refilled: list[str] = []
        self.dropped: list[str] = []
        self.hidden: list[_Copier] = []
        self.functions: dict[int, Any] = {}
        self.memo: dict[int, Any] = {}

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that were found, those of modules included."""
        for owner in self.owners.values():
            if isinstance(owner, nn.Module):
                yield from owner.parameters()
                yield from owner.buffers()
            elif isinstance(owner, Tensor):
                yield owner
        for hidden in self.hidden:
            yield from hidden.tensors()

    def copied(self, value: Any, name: str) -> Any:
        """The copy of a value; what holds no module, no tensor and no function is returned as it is."""
        if isinstance(value, types.FunctionType):
            if id(value) not in self.functions:
                self.functions[id(value)] = value
                self.functions[id(value)] = self._copied_function(value)
            return self.functions[id(value)]
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self.copied(value.__self__, name))
        if isinstance(value, functools.partial):
            arguments = [self.copied(each, f"{name}{i}") for i, each in enumerate(value.args)]
            options = {key: self.copied(each, key) for key, each in value.keywords.items()}
            return functools.partial(self.copied(value.func, name), *arguments, **options)
        if type(value) in (list, tuple, set):
            return type(value)(self.copied(each, f"{name}.{i}") for i, each in enumerate(value))
        if type(value) is dict:
            return {key: self.copied(each, f"{name}.{key}") for key, each in value.items()}
        if not holds_tensors(value):
            return value
        twin = self._converted(self._twin(value), name)
        return twin

    def _twin(self, value: Any) -> Any:
        """A deep copy; what cannot be copied, such as a lock, is shared, and a tensor with a history is detached."""
        if isinstance(value, Tensor) and not value.is_leaf:
            return value.detach().clone()
        try:
            return copy.deepcopy(value, self.memo)
        except Exception:  # a stranger's objects may raise anything when they are copied
            shared: dict[int, Any] = {}
            for each in _parts(value):
                if isinstance(each, Tensor) and not each.is_leaf:
                    shared[id(each)] = each.detach().clone()
                elif not holds_tensors(each) and not _can_be_copied(each):
                    shared[id(each)] = each
            return copy.deepcopy(value, shared)

    def _converted(self, value: Any, name: str, depth: int = 0) -> Any:
        """Put modules into eval mode, modules and tensors into the dtype, and remember them as owners."""
        if isinstance(value, Tensor):
            value = self._cast(value)
            self.owners.setdefault(name, value)
        elif isinstance(value, nn.Module):
            if not any(value is inner for inner in self._known_modules()):
                self.owners[name] = value
            value.eval()
            if self.dtype is not None:
                value.to(self.dtype)
            for module in [*value.modules()]:
                self._convert_attributes(module)
                self.dropped += _drop_hooks(module)
            if self.refill:
                self._refill(value, name)
        elif isinstance(value, (list, tuple)):
            each = [self._converted(part, f"{name}.{i}", depth + 1) for i, part in enumerate(value)]
            value = value._make(each) if hasattr(value, "_make") else type(value)(each)
        elif isinstance(value, dict):
            for key, part in value.items():
                value[key] = self._converted(part, f"{name}.{key}", depth + 1)
        elif holds_tensors(value) and depth < DEPTH:
            for key, part in attributes_of(value).items():
                inner = f"{name}.{key}" if name else key
                object.__setattr__(value, key, self._converted(part, inner, depth + 1))
        return value

    def _refill(self, module: nn.Module, name: str) -> None:
        """Give parameters that begin at zero small random numbers: behind them nothing can be seen."""
        generator = torch.Generator("cpu").manual_seed(0)
        for place, parameter in module.named_parameters(prefix=name):
            empty = parameter.numel() == 0 or parameter.is_meta or bool((parameter != 0).any())
            if empty or not parameter.is_floating_point() or "bias" in place or place[:2] == "b_":
                continue
            noise = torch.randn(parameter.shape, generator=generator, device="cpu") * 0.1
            with torch.no_grad():
                parameter.copy_(noise)
            self.refilled.append(place)

    def _known_modules(self) -> Iterator[nn.Module]:
        for owner in self.owners.values():
            if isinstance(owner, nn.Module):
                yield from owner.modules()

    def _convert_attributes(self, module: nn.Module) -> None:
        """Tensors, modules and objects that a module holds without registering them."""
        for name, value in attributes_of(module).items():
            if isinstance(value, types.FunctionType):
                object.__setattr__(module, name, self.copied(value, name))
            if name.startswith("_") or isinstance(value, nn.Module) or not holds_tensors(value):
                continue
            object.__setattr__(module, name, self._unregistered(value))

    def _unregistered(self, value: Any) -> Any:
        inner = _Copier(self.dtype, self.refill)
        self.hidden.append(inner)
        return inner._converted(value, "")

    def _cast(self, value: Tensor) -> Tensor:
        if self.dtype is None or not value.is_floating_point():
            return value
        if isinstance(value, nn.Parameter):
            value.data = value.data.to(self.dtype)
            return value
        return value.detach().to(self.dtype).requires_grad_(value.requires_grad)

    def _copied_function(self, function: types.FunctionType) -> Any:
        """The same code over copies of what it closes over and of the globals that it names."""
        if (function.__module__ or "").split(".")[0] in LEFT_ALONE:
            return function
        own = {name: function.__globals__.get(name) for name in _names_in(function.__code__)}
        used = {name: self.copied(value, name) for name, value in own.items() if value is not None}
        free = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        cells = tuple(types.CellType(self._copied_cell(cell, name)) for name, cell in free)
        defaults = self.copied(function.__defaults__, "default")
        twin = types.FunctionType(
            function.__code__, {**function.__globals__, **used}, function.__name__, defaults, cells
        )
        twin.__kwdefaults__ = self.copied(function.__kwdefaults__, "default")
        return twin

    def _copied_cell(self, cell: types.CellType, name: str) -> Any:
        try:
            return self.copied(cell.cell_contents, name)
        except ValueError:
            return None


def _drop_hooks(module: nn.Module) -> list[str]:
    """Remove the hooks that watch a module from outside; those of torch, such as weight norm, belong to it."""
    dropped = []
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            if not (getattr(hook, "__module__", None) or "").startswith("torch."):
                del hooks[key]
                dropped.append(f"{getattr(hook, '__name__', 'hook')} on {type(module).__name__}")
    return dropped


def holds_tensors(value: Any, depth: int = 0) -> bool:
    """Whether a value is, or leads within a few steps to, a module or a tensor."""
    if isinstance(value, (nn.Module, Tensor)):
        return True
    if depth >= DEPTH or isinstance(value, (type, types.ModuleType, str, bytes, int, float)):
        return False
    if isinstance(value, (list, tuple, set, dict)):
        inside = value.values() if isinstance(value, dict) else value
        return any(holds_tensors(each, depth + 1) for each in itertools.islice(inside, 100))
    return any(holds_tensors(each, depth + 1) for each in attributes_of(value).values())


def attributes_of(value: Any) -> dict[str, Any]:
    """The attributes of an object, those in slots included; none for classes, modules of Python and functions."""
    if isinstance(value, (type, types.ModuleType, types.FunctionType)):
        return {}
    slots = [name for each in type(value).__mro__ for name in getattr(each, "__slots__", ())]
    found = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return {**found, **getattr(value, "__dict__", {})}


def _parts(value: Any, depth: int = 0) -> Iterator[Any]:
    """Everything that a value leads to within a few steps."""
    if depth > 2 * DEPTH or isinstance(value, (type, types.ModuleType)):
        return
    if isinstance(value, (list, tuple, set, dict)):
        inside = value.values() if isinstance(value, dict) else value
    else:
        yield value
        inside = attributes_of(value).values()
    for each in inside:
        yield from _parts(each, depth + 1)


def _can_be_copied(value: Any) -> bool:
    try:
        copy.deepcopy(value)
    except Exception:  # as above
        return False
    return True


def _names_in(code: types.CodeType) -> set[str]:
    """The names that a function uses, functions inside of it included."""
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    own = {
        str(step.argval)
        for step in dis.get_instructions(code)
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    return own.union(*(_names_in(each) for each in inner))

"""The projections of somebody's attention, found by the names and shapes that people give them.

Built in chapter 4 of the book.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

FILLER = (
    r"(?:to|w|fc|c|projection|project|proj|linear|lin|layer|weights|weight|matrix|mat|dense|mappings|mapping|map"
    r"|transformation|transform|embedding|embed|net|base|all|self|s|heads|head|attn|attention)*"
)
ROLES = {
    "query": "q|query|queries",
    "key": "k|key|keys",
    "value": "v|val|value|values",
    "packed": "in|pack|packed|attn|attention|querykeyvalue|qkv|qvk|kqv|kvq|vqk|vkq",
    "packed_kv": "kv|keyvalue|vk",
    "out": "|o|out|output|outputs|final|unify|combine|concat|merge|mix|res|resid|z",
}
"""What people call a projection, without the filler around it."""

VAGUE = {"linear", "lin", "dense", "layer", "fc", "net", "base_layer", "weight", "bias", "w", "b"}
"""Names that say nothing: the module around them has the telling name."""


class Projections(NamedTuple):
    """The weights of an attention, rows and columns as in ``nn.Linear``.

    Attributes:
        query, key, value: Shapes ``((h d), e)`` and ``((k d), e)``.
        out: Shape ``(e, (h d))``, or None if there is none.
        query_bias, key_bias, value_bias, out_bias: One number a row, or None.
        packed: What came as one matrix: ``"qkv"``, ``"kv"`` or ``""``.
        sliced: Whether each head has a matrix for its own slice of the tokens only.
        raw: Whether bare square matrices were found, which may be meant either way round.
        places: Where each was found.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor | None = None
    query_bias: Tensor | None = None
    key_bias: Tensor | None = None
    value_bias: Tensor | None = None
    out_bias: Tensor | None = None
    packed: str = ""
    sliced: bool = False
    raw: bool = False
    places: Mapping[str, str] = {}

    def to(self, device: torch.device) -> Projections:
        """The same weights in float64."""
        changed: dict[str, Any] = {
            name: value.detach().to(device, torch.float64)
            for name, value in self._asdict().items()
            if isinstance(value, Tensor)
        }
        return self._replace(**changed)

    @property
    def adds_heads(self) -> bool:
        """Whether the output projection takes the features of one head only."""
        merged = len(self.value) * len(self.query) // len(self.key)
        return self.out is not None and self.out.shape[1] < merged

    def read(self, layout: str, num_heads: int) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Weight and bias of ``q``, ``k`` and ``v``, if the packed rows are read in the given order."""
        weights = [self.query, self.key, self.value]
        biases = [self.query_bias, self.key_bias, self.value_bias]
        if layout != "three h d":
            weights = _reread(weights, layout, num_heads)
            if any(bias is not None for bias in biases):
                pairs = zip((self.query, self.key, self.value), biases, strict=True)
                filled = [torch.zeros_like(w[:, 0]) if b is None else b for w, b in pairs]
                biases = [*_reread(filled, layout, num_heads)]
        return dict(zip("qkv", zip(weights, biases, strict=True), strict=True))


def _reread(parts: list[Tensor], layout: str, num_heads: int) -> list[Tensor]:
    """Read the rows of the query, key and value matrices, one after the other, in another order."""
    if layout == "k two d":
        kv_heads = len(parts[1]) * num_heads // len(parts[0])
        pattern = f"({layout}) ... -> two (k d) ..."
        return [parts[0], *rearrange(torch.cat(parts[1:]), pattern, two=2, k=kv_heads)]
    rows = torch.cat(parts)
    if layout == "k (g two) d":
        dim, kv_heads = len(parts[0]) // num_heads, len(parts[1]) * num_heads // len(parts[0])
        groups = rearrange(rows, "(k g d) ... -> k g d ...", k=kv_heads, d=dim)
        each = groups[:, :-2], groups[:, -2:-1], groups[:, -1:]
        return [rearrange(part, "k g d ... -> (k g d) ...") for part in each]
    return [*rearrange(rows, f"({layout}) ... -> three (h d) ...", three=3, h=num_heads)]


class Piece(NamedTuple):
    """One matrix or bias that was found: its place, its role, and whether it is not a module's own weight."""

    place: str
    role: str
    tensor: Tensor
    bias: Tensor | None
    raw: bool


def role_of(place: str) -> str:
    """The role that a dotted name speaks of, or an empty string.

    Example:
        >>> [role_of(name) for name in ("W_q", "attn.to_kv", "query.linear", "c_proj", "norm")]
        ['query', 'packed_kv', 'query', 'out', '']
    """
    words = [word for word in place.split(".") if word and not word.isdigit()]
    while len(words) > 1 and words[-1].lower() in VAGUE:
        outer = _role_of_word(words[-2])
        if outer not in ("query", "key", "value", "out", "packed_kv") and words[-2] not in VAGUE:
            break
        words.pop()
    return _role_of_word(words[-1]) if words else ""


def _role_of_word(word: str) -> str:
    letters = re.sub(r"[^a-z]", "", word.lower())
    for role, names in ROLES.items():
        if re.fullmatch(f"{FILLER}(?:{names}){FILLER}", letters):
            return role
    return ""


def pieces_of(owner: object, place: str = "") -> Iterator[Piece]:
    """The matrices that a module, a tensor, or a list or dict of them holds, lists outside of modules included."""
    inner = f"{place}." if place else ""
    if isinstance(owner, Tensor):
        yield from _bare(owner, place)
    elif isinstance(owner, (list, tuple)):
        for number, value in enumerate(owner):
            yield from pieces_of(value, f"{inner}{number}")
    elif isinstance(owner, Mapping):
        for name, value in owner.items():
            yield from pieces_of(value, f"{inner}{name}")
    elif isinstance(owner, nn.Module):
        matrix = _matrix_of(owner)
        if matrix is not None:
            role = _role_of_shape(role_of(place), matrix)
            yield Piece(place, role, matrix, getattr(owner, "bias", None), False)
            return
        whole = _whole(owner, place)
        if whole is not None:
            yield whole
            return
        if isinstance(owner, nn.MultiheadAttention):
            yield from _torch_pieces(owner, inner)
            return
        held = {**owner._parameters, **owner._modules}
        held.update((name, value) for name, value in vars(owner).items() if _is_own(name, value))
        yield from pieces_of(held, place)


def _is_own(name: str, value: object) -> bool:
    """Whether an attribute is a plain container or tensor that its author made."""
    return not name.startswith("_") and isinstance(value, (list, tuple, dict, Tensor))


def _matrix_of(module: nn.Module) -> Tensor | None:
    """The matrix of a module that maps features, rows first; None for any other module."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(module, nn.Embedding):
        return None
    if type(module).__name__ == "Conv1D" and weight.ndim == 2:
        return weight.T
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return weight.flatten(1) if weight[0, 0].numel() == 1 else None
    return weight if weight.ndim == 2 else None


def _whole(module: nn.Module, place: str) -> Piece | None:
    """A projection made of several matrices, such as one with an adapter: what it does to unit vectors."""
    role = role_of(place)
    matrices = [each for each in module.modules() if _matrix_of(each) is not None]
    if len(matrices) < 2 or not role or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return None
    weight = _matrix_of(matrices[0])
    assert weight is not None
    unit = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    try:
        bias = module(torch.zeros_like(unit[None, :1]))[0, 0]
        matrix = (module(unit[None])[0] - bias).T
        is_linear = torch.allclose(module(2 * unit[None] + 1)[0], (2 * unit + 1) @ matrix.T + bias)
    except Exception:  # a module that is no map of features
        return None
    return Piece(place, _role_of_shape(role, matrix), matrix, bias, False) if is_linear else None


def _torch_pieces(module: nn.MultiheadAttention, inner: str) -> Iterator[Piece]:
    """The matrices of torch's own module, whose biases are packed even where its weights are not."""
    if module.in_proj_weight is not None:
        weight, bias = module.in_proj_weight, module.in_proj_bias
        yield Piece(f"{inner}in_proj_weight", "packed", weight, bias, False)
    else:
        biases = [None] * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        for role, bias in zip(("query", "key", "value"), biases, strict=True):
            weight = getattr(module, f"{role[0]}_proj_weight")
            yield Piece(f"{inner}{role[0]}_proj_weight", role, weight, bias, False)
    last = module.out_proj
    yield Piece(f"{inner}out_proj", "out", last.weight, last.bias, False)


def _bare(tensor: Tensor, place: str) -> Iterator[Piece]:
    """A tensor that stands by itself: a matrix, or a bias if its name or its shape says so."""
    if not tensor.is_floating_point() or tensor.ndim == 0:
        return
    role = role_of(re.sub(r"bias(?:es)?|(?:^|(?<=[._]))b(?=_|[A-Zqkvo]|$)", "", place))
    says_bias = is_bias(place)
    if tensor.ndim == 1 or (says_bias and tensor.ndim == 2):
        if role and says_bias:
            yield Piece(place, f"{role}_bias", tensor.flatten(), None, True)
    elif role:
        yield Piece(place, _role_of_shape(role, tensor), tensor, None, True)


def is_bias(place: str) -> bool:
    """Whether the name of a tensor says that it is a bias: ``q_bias``, ``b_Q``, ``bo``, ``out.bias``."""
    name = place.rsplit(".", 1)[-1]
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]", name)]
    return (
        "b" in words[:1]
        or "bias" in words
        or "biases" in words
        or name.lower() in ("bq", "bk", "bv", "bo")
    )


def _role_of_shape(role: str, matrix: Tensor) -> str:
    """A packed matrix is not square: what is, and is called ``attn``, is the output projection."""
    is_square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
    return "out" if role == "packed" and is_square else role


def find_projections(
    owners: Mapping[str, object], embed_dim: int, num_heads: int, num_kv_heads: int | None
) -> Projections | str:
    """Find the projections in modules and tensors, or in one module inside of them.

    Returns:
        The projections, or why there are none.
    """
    found = _assemble([*pieces_of(owners)], embed_dim, num_heads, num_kv_heads)
    if isinstance(found, Projections):
        return found
    inside = []
    for name, owner in owners.items():
        modules = owner.named_modules(prefix=name) if isinstance(owner, nn.Module) else ()
        for place, module in modules:
            pieces = [*pieces_of({place: module})]
            each = _assemble(pieces, embed_dim, num_heads, num_kv_heads)
            if isinstance(each, Projections):
                inside.append(each)
    places = {tuple(each.places.items()) for each in inside}
    if len(places) > 1:
        return f"{len(places)} sets of projections were found: pass the one attention to examine"
    return inside[0] if inside else found


def given_projections(
    weights: Mapping[str, Any], embed_dim: int, num_heads: int, num_kv_heads: int | None
) -> Projections | str:
    """The projections in a dict of matrices or a state dict, all of them as ``nn.Linear`` has them."""
    pieces = []
    for name, value in weights.items():
        tensor = torch.as_tensor(value).detach()
        if tensor.is_meta or tensor.layout != torch.strided:
            return f"{name} is not a dense matrix with numbers"
        for piece in _bare(tensor.double(), str(name).removesuffix(".weight")):
            pieces.append(piece._replace(raw=False) if tensor.ndim < 3 else piece)
    return _assemble(pieces, embed_dim, num_heads, num_kv_heads)


def _assemble(
    pieces: Sequence[Piece], embed_dim: int, num_heads: int, num_kv_heads: int | None
) -> Projections | str:
    """Put the pieces together, or say what is missing."""
    roles: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        roles[piece.role].append(piece)
    for role, each in roles.items():
        registered = [piece for piece in each if not piece.raw]
        roles[role] = registered or each
    unnamed = roles["out"]
    if not roles["query"] and not roles["packed"] and len(unnamed) in (3, 4):
        for role, piece in zip(("query", "key", "value", "out"), list(unnamed), strict=False):
            roles[role] = [piece]
        if len(unnamed) == 3:
            roles["out"] = []
    heads = {"query": num_heads, "key": num_kv_heads or num_heads}
    heads["value"] = heads["key"]
    places = {role: each[0].place for role, each in roles.items() if role and each}
    parts: dict[str, tuple[Tensor, Tensor | None]] = {}
    packed = ""
    try:
        for role in ("query", "key", "value"):
            if roles[role]:
                parts[role] = _stacked(roles, role, embed_dim, heads[role])
        if not parts and roles["packed"]:
            packed, parts = "qkv", _unpacked(roles, embed_dim, heads)
        elif roles["packed_kv"] and "query" in parts:
            packed, (weight, bias) = "kv", _stacked(roles, "packed_kv", embed_dim, 1)
            biases = [None, None] if bias is None else bias.chunk(2)
            parts.update(
                zip(("key", "value"), zip(weight.chunk(2), biases, strict=True), strict=True)
            )
        if {*parts} != {"query", "key", "value"}:
            missing = [role for role in ("query", "key", "value") if role not in parts]
            return f"no projection was recognised for {', '.join(missing)}"
        out = _output(roles, num_heads, len(parts["query"][0]))
    except _UnclearError as error:
        return str(error)
    rows = [len(parts[role][0]) for role in ("query", "key", "value")]
    if rows[0] % num_heads or rows[1] % (rows[0] // num_heads):
        return f"projections with {rows} rows do not make num_heads={num_heads} heads"
    if num_kv_heads and rows[1] * num_heads != rows[0] * num_kv_heads:
        return f"projections with {rows} rows do not make num_kv_heads={num_kv_heads} heads"
    for matrix, bias in (*parts.values(), out):
        if matrix is not None and bias is not None and len(bias) != len(matrix):
            return f"a bias has {len(bias)} numbers for a matrix of shape {tuple(matrix.shape)}"
    used = [piece for role in ("query", "key", "value", "packed", "out") for piece in roles[role]]
    ordered = [parts[role] for role in ("query", "key", "value")]
    (query, query_bias), (key, key_bias), (value, value_bias) = ordered
    return Projections(
        query,
        key,
        value,
        out[0],
        query_bias,
        key_bias,
        value_bias,
        out[1],
        packed=packed,
        sliced=any(_is_slice(piece, embed_dim) for piece in roles["query"]),
        raw=any(piece.raw and piece.tensor.ndim == 2 for piece in used),
        places=places,
    )


class _UnclearError(ValueError):
    """What was found does not make one attention."""


def _is_slice(piece: Piece, embed_dim: int) -> bool:
    return piece.tensor.ndim == 2 and piece.tensor.shape[1] < embed_dim and not piece.raw


def _bias(roles: Mapping[str, list[Piece]], role: str) -> Tensor | None:
    """The bias of a role, from its modules or from a tensor of its own."""
    own = [piece.bias for piece in roles[role] if piece.bias is not None]
    own = own or [piece.tensor for piece in roles.get(f"{role}_bias", [])]
    return torch.cat(own) if own else None


def _stacked(
    roles: Mapping[str, list[Piece]], role: str, embed_dim: int, num_heads: int
) -> tuple[Tensor, Tensor | None]:
    """The matrix of a role, ``((h d), e)``, from one piece or one piece for each head, and its bias."""
    found = roles[role]
    if len(found) not in (1, num_heads):
        raise _UnclearError(
            f"{len(found)} matrices look like the {role} projection of {num_heads} heads"
        )
    if all(_is_slice(piece, embed_dim) for piece in found):
        each = found * num_heads if len(found) == 1 else found
        bias = _bias({**roles, role: each}, role)
        if each[0].tensor.shape[1] * num_heads != embed_dim:
            raise _UnclearError(f"the {role} projection reads {each[0].tensor.shape[1]} features")
        return _blocks([piece.tensor for piece in each]), bias
    matrices = [_rows_first(piece, embed_dim) for piece in found]
    return torch.cat(matrices), _bias(roles, role)


def _blocks(matrices: Sequence[Tensor]) -> Tensor:
    """One matrix with the given ones on its diagonal."""
    width = sum(matrix.shape[1] for matrix in matrices)
    rows, start = [], 0
    for matrix in matrices:
        row = matrix.new_zeros(len(matrix), width)
        row[:, start : start + matrix.shape[1]] = matrix
        rows.append(row)
        start += matrix.shape[1]
    return torch.cat(rows)


def _rows_first(piece: Piece, embed_dim: int) -> Tensor:
    """A matrix or a stack of one matrix a head, turned to ``((h d), e)``."""
    tensor = piece.tensor
    if tensor.ndim == 3:
        where = [axis for axis in (1, 0, 2) if tensor.shape[axis] == embed_dim]
        patterns = ("e h d -> (h d) e", "h e d -> (h d) e", "h d e -> (h d) e")
        tensor = rearrange(tensor, patterns[where[0]]) if where else tensor
    elif piece.raw and tensor.ndim == 2 and tensor.shape[0] == embed_dim:
        tensor = tensor.T
    if tensor.ndim != 2 or tensor.shape[1] != embed_dim:
        raise _UnclearError(f"{piece.place} has shape {tuple(piece.tensor.shape)}")
    return tensor


def _unpacked(
    roles: Mapping[str, list[Piece]], embed_dim: int, heads: Mapping[str, int]
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Query, key and value matrices from one packed matrix, or from one for each head."""
    found = roles["packed"]
    if len(found) not in (1, heads["query"]):
        raise _UnclearError(f"{len(found)} matrices look like a packed projection")
    if len(found) == 1 and found[0].tensor.ndim == 3:
        weight = torch.cat(
            [_rows_first(found[0]._replace(tensor=one), embed_dim) for one in found[0].tensor]
        )
    else:
        weight = torch.cat([_rows_first(piece, embed_dim) for piece in found])
    bias = _bias(roles, "packed")
    dim, rest = divmod(len(weight), heads["query"] + 2 * heads["key"])
    if rest:
        raise _UnclearError(
            f"{found[0].place} has {len(weight)} rows, which do not make three projections"
        )
    sizes = [heads[role] * dim for role in ("query", "key", "value")]
    if len(found) > 1:
        order = torch.arange(len(weight), device=weight.device)
        order = rearrange(order, "(h three d) -> (three h d)", three=3, d=dim)
        weight, bias = weight[order], None if bias is None else bias[order]
    names = re.search("qkv|qvk|kqv|kvq|vqk|vkq", found[0].place.lower())
    letters = names.group() if names and sizes[0] == sizes[1] else "qkv"
    own = {name: _bias(roles, name) for name in ("query", "key", "value")}
    biases = () if bias is None else torch.split(bias, sizes)
    parts = {}
    for number, matrix in enumerate(torch.split(weight, sizes)):
        role = next(name for name in own if name[0] == letters[number])
        parts[role] = matrix, own[role] if bias is None else biases[number]
    return parts


def _output(
    roles: Mapping[str, list[Piece]], num_heads: int, width: int
) -> tuple[Tensor | None, Tensor | None]:
    """The output matrix, ``(e, (h d))``, from one piece or one for each head, and its bias."""
    found = roles["out"]
    fitting = [piece for piece in found if width in piece.tensor.shape] or found
    named = [piece for piece in fitting if re.search("o(?:ut|$)", piece.place.lower())]
    if not found:
        return None, None
    if (
        len(found) == num_heads > 1
        and len(fitting) == len(found)
        and width not in found[0].tensor.shape[1:]
    ):
        matrices = [piece.tensor for piece in found]
        bias = [piece.bias for piece in found if piece.bias is not None]
        return torch.cat(matrices, dim=1), sum(bias[1:], bias[0]) if bias else None
    if len(fitting) > 1 and len(named) != 1:
        raise _UnclearError(f"{len(fitting)} matrices look like the output projection")
    piece = fitting[0] if len(fitting) == 1 else named[0]
    tensor = piece.tensor
    if tensor.ndim == 3:
        first = tensor.shape[0] == num_heads
        tensor = rearrange(tensor, "h d e -> e (h d)" if first else "e h d -> e (h d)")
    elif piece.raw:
        tensor = tensor.T
    if tensor.ndim != 2:
        raise _UnclearError(f"{piece.place} has shape {tuple(piece.tensor.shape)}")
    return tensor, piece.bias if piece.bias is not None else _bias(roles, "out")

"""What the doctor advises for each finding, and the lines of source to look at. Built in chapter 4 of the book."""

from __future__ import annotations

import ast
import functools
import inspect
import math
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

SPLIT = r"\bview\(|reshape\(|rearrange\(|unflatten\(|chunk\(|split\("
MERGE = r"transpose\(|permute\(|view\(|reshape\(|rearrange\(|flatten\(|concat|cat\("
SCALE = r"sqrt|\*\*\s*\(?-?0?\.5|\*\*\s*-?\(?1 ?/ ?2|scal|\bdim\b.*\*\*|math\.pow"
SOFTMAX = r"softmax\("
MASK = r"mask|tril|triu|-?inf\b|is_causal|bias\["
PROJECT = r"Linear\(|Parameter\(|Conv1D\(|[qkv]\w*\s*=\s*self\.|_proj\(|einsum"
ORDER = r"chunk\(|split\(|unbind|\w+, *\w+, *\w+ *=|[qkv]\w* *= *self\.\w+\("
WINDOW = r"window|tril|triu|mask|<=?\s"
ROTARY = r"rotary|rope|\bcos\b|\bsin\b|rotate"

HINTS = {
    "raises": "Call it once on torch.randn(2, 5, embed_dim) and read the first line of the traceback. If it takes "
    "other arguments, wrap it: diagnose(lambda x: module(x, x, x), ...); if it needs a mask, pass takes_mask=True.",
    "cannot_be_copied": "The doctor examines a copy. Wrap the module in a function that builds it, or remove the "
    "attribute that the message names.",
    "output_shape": "Print the shape after each view, transpose and matrix product: the last axis must end as "
    "embed_dim, the second one as the number of tokens.",
    "output_type": "Return one floating tensor of the input's dtype, or a tuple that begins with it; cast softmax "
    "weights back with .to(value.dtype).",
    "not_finite": "Look for rows of the mask that forbid every key, and for a division by zero.",
    "input_overwritten": "Replace in-place operations on the input (x += ..., x.mul_) by new tensors.",
    "parameters_not_registered": "Use nn.ModuleList or nn.ParameterList in place of a Python list, so that the "
    "optimizer, .to(device) and state_dict see them.",
    "output_changes_between_calls": "Something is kept between calls, such as a cache or a counter in self. Pass it "
    "in and return it, or reset it.",
    "dropout_in_eval": "Pass `self.dropout if self.training else 0.0` to scaled_dot_product_attention and "
    "training=self.training to F.dropout, or use nn.Dropout.",
    "samples_mixed": "The batch axis is taken for the tokens or for the heads: batch_first, a softmax over axis 0, or "
    "a view that begins with another axis than the batch.",
    "tokens_scrambled": "Numbers of different tokens are mixed by a view. Split with "
    "rearrange(x, 'b n (h d) -> b h n d', h=num_heads), merge with 'b h n d -> b n (h d)'.",
    "sees_future": "Apply the causal mask before the softmax, with the sense that your function expects; "
    "is_causal=True alone is only a hint to nn.MultiheadAttention. Or a view mixes tokens.",
    "ignores_past": "Look at the mask, and at the axis along which attention runs: earlier tokens have no influence.",
    "ignores_future": "If it is causal by design, pass causal=True to diagnose; if not, remove the causal mask, or "
    "look at the axis along which attention runs.",
    "causal_off_by_one": "Token i must see token j where j <= i: torch.tril(ones), or triu(ones, diagonal=1) for what "
    "is forbidden.",
    "padding_leaks": "Set scores of padded keys to minus infinity before the softmax; a (b, n) mask belongs on the "
    "key axis: mask[:, None, None, :].",
    "mask_inverted": "Turn the mask round. scaled_dot_product_attention takes True = may attend; key_padding_mask and "
    "masked_fill take True = forbidden.",
    "mask_times_zero": "Use masked_fill(forbidden, float('-inf')): a score of 0, or of 1e-9, still gets weight.",
    "mask_after_softmax": "Mask the scores before the softmax: weights that are set to 0 after it no longer sum to 1.",
    "nan_when_all_masked": "Give rows without an allowed key zeros: fill a finite number in such rows before the "
    "softmax and multiply by 0 after it, as mha_lib does.",
    "split_without_transpose": "Write x.view(b, n, heads, head_dim).transpose(1, 2), or "
    "rearrange(x, 'b n (h d) -> b h n d', h=heads).",
    "merge_without_transpose": "Write y.transpose(1, 2).reshape(b, n, heads * head_dim), or "
    "rearrange(y, 'b h n d -> b n (h d)').",
    "heads_dim_major": "A head's features are neighbours: (h d), not (d h). Trained from scratch this works; weights "
    "of other code, or for other code, will not.",
    "qkv_layout_wrong": "Split the packed projection into query, key and value first, then into heads: (three h d).",
    "qkv_order_swapped": "The order is query, key, value. Trained from scratch this works; weights of other code, or "
    "for other code, will not.",
    "scale_sqrt_embed_dim": "Divide by sqrt(head_dim), the width of one head.",
    "scale_missing": "Divide the scores by sqrt(head_dim) before the softmax.",
    "scale_without_sqrt": "Divide once, by sqrt(head_dim); scaled_dot_product_attention does so by itself.",
    "scale_inverted": "Divide by sqrt(head_dim); do not multiply.",
    "scale_wrong": "Divide by sqrt(head_dim), or pass scale= to diagnose if another factor is meant.",
    "softmax_over_queries": "Use softmax(dim=-1), the axis of the keys.",
    "softmax_over_heads": "Use softmax(dim=-1), the axis of the keys; without dim, F.softmax takes axis 1 of four.",
    "softmax_missing": "Take softmax(dim=-1) of the scores, over the axis of the keys.",
    "softmax_twice": "Take the softmax once; cross_entropy and some helpers take one by themselves.",
    "bias_missing": "Call the Linear, or add its bias: F.linear(x, layer.weight) leaves it out.",
    "input_sliced_per_head": "Project the whole token for each head, Linear(embed_dim, ...), and split the result.",
    "single_head": "Split query, key and value into heads before the scores: one softmax for each head.",
    "num_heads_wrong": "Look at the view: sizes of heads and head_dim are swapped, or num_heads is another one.",
    "kv_heads_tiled": "Use repeat_interleave(groups, dim=1), or repeat(k, 'b k n d -> b (k g) n d', g=groups); "
    "tensor.repeat tiles.",
    "heads_added": "Concatenate the heads and project them with one matrix of shape (embed_dim, heads * head_dim).",
    "projection_reused": "One projection serves twice; look for a loop or a copied line that overwrites query, key or "
    "value.",
    "projection_skipped": "Query, key and value each need a projection of their own.",
    "weight_transposed": "nn.Linear computes x @ weight.T; Conv1D of GPT-2 holds the transposed matrix.",
    "output_projection_missing": "Apply the output projection to the merged heads; without it no head mixes with "
    "another.",
    "window_off_by_one": "A causal window of W holds W keys, the query's own included: i - j < W.",
    "window_ignored": "Apply the window to the scores: forbidden where i - j >= window.",
    "rotary_missing": "Rotate queries and keys after the split into heads and before the scores.",
    "rotary_layout": "Pairs are (m, m + d / 2) in Llama of transformers, (2 m, 2 m + 1) in the paper; use the layout "
    "that the weights were trained with.",
    "rotary_on_values": "Rotate queries and keys only.",
    "rotary_on_one_side": "Rotate queries and keys, both from the same position.",
    "rotary_wrong_axis": "Rotate along the tokens: the axis of positions is not that of the heads.",
    "softcap_missing": "Apply softcap * tanh(scores / softcap) before the mask.",
    "qk_norm_missing": "Normalise queries and keys, head by head, before the scores.",
    "softmax_overflows": "Subtract the maximum before exp, or call softmax, which does so.",
    "overflow_in_half": "Fill with torch.finfo(scores.dtype).min or -inf, not -1e9, scale the query before the "
    "product, and take the softmax in float32.",
    "parameter_without_gradient": "Look for a projection that is created and not used, a variable that is "
    "overwritten, detach(), .data, torch.tensor(...) or no_grad in forward.",
}
"""How each finding is mended."""

LINES = {
    **dict.fromkeys(("split_without_transpose", "num_heads_wrong", "single_head"), SPLIT),
    **dict.fromkeys(("tokens_scrambled", "samples_mixed", "heads_dim_major"), SPLIT + "|" + MERGE),
    **dict.fromkeys(("merge_without_transpose", "heads_added"), MERGE),
    **dict.fromkeys(("scale_sqrt_embed_dim", "scale_missing", "scale_without_sqrt"), SCALE),
    **dict.fromkeys(("scale_inverted", "scale_wrong"), SCALE),
    **dict.fromkeys(("softmax_over_queries", "softmax_over_heads", "softmax_overflows"), SOFTMAX),
    **dict.fromkeys(("softmax_missing", "softmax_twice"), SOFTMAX),
    **dict.fromkeys(("sees_future", "causal_off_by_one", "padding_leaks", "mask_inverted"), MASK),
    **dict.fromkeys(("mask_times_zero", "nan_when_all_masked"), MASK),
    "mask_after_softmax": MASK + r"|tri\b|\* *\w+",
    **dict.fromkeys(("overflow_in_half", "ignores_past", "ignores_future"), MASK),
    **dict.fromkeys(("window_off_by_one", "window_ignored"), WINDOW),
    **dict.fromkeys(("rotary_missing", "rotary_layout", "rotary_on_values"), ROTARY),
    **dict.fromkeys(("rotary_on_one_side", "rotary_wrong_axis"), ROTARY),
    **dict.fromkeys(("input_sliced_per_head", "projection_skipped", "projection_reused"), PROJECT),
    **dict.fromkeys(("qkv_order_swapped", "qkv_layout_wrong"), ORDER),
    **dict.fromkeys(("weight_transposed", "bias_missing"), r"\.weight|@ *self|F\.linear|Linear\("),
    "output_projection_missing": r"\breturn\b|proj|\bout",
    "parameter_without_gradient": r"detach|\.data\b|no_grad|torch\.tensor\(",
    "kv_heads_tiled": r"repeat|expand|tile",
    "dropout_in_eval": r"dropout",
    "parameters_not_registered": r"=\s*\[",
}
"""What a line of source looks like that may hold the mistake."""

ATTENDS = r"softmax|scaled_dot_product|matmul\(|@|einsum|bmm\("
"""A line that computes scores or attends: splits stand before the first of them, merges after the last."""

NOT_THEIRS = {"torch", "builtins", "abc", "typing"}
"""Where classes come from that nobody wrote for this attention."""

SHOWN_LINES = 5
"""More lines than these are no help."""


def lines_to_look_at(
    candidate: Callable[..., Any], finding: str, evidence: str = ""
) -> tuple[str, ...]:
    """Lines of the candidate's source that may hold the mistake, as ``file:number: code``; none if unreadable."""
    pattern = LINES.get(finding)
    if pattern is None:
        return ()
    if finding == "parameter_without_gradient":
        names = re.findall(r"(\w+)\.(?:weight|bias)", evidence)
        pattern = "|".join([pattern, *(rf"\b{name}\b" for name in names if not name.isdigit())])
    found = []
    for source in _sources(candidate):
        try:
            lines, start = inspect.getsourcelines(source)
            path = _shown_name(inspect.getsourcefile(source) or "source")
        except (OSError, TypeError):
            continue
        numbered = _code_of(lines, start or 1)
        attends = [number for number, code in numbered if re.search(ATTENDS, code)]
        first, last = (attends[0], attends[-1]) if attends else (math.inf, -math.inf)
        for number, code in numbered:
            misplaced = (pattern == SPLIT and number > first) or (
                pattern == MERGE and number < last
            )
            if re.search(pattern, code) and not misplaced:
                found.append(f"{path}:{number}: {code}")
    return tuple(found[:SHOWN_LINES])


def _code_of(lines: list[str], start: int) -> list[tuple[int, str]]:
    """The numbered lines of a function that do something: neither its signature nor a docstring."""
    numbered = [(n, line.split("#")[0].strip()) for n, line in enumerate(lines, start)]
    try:
        (node,) = ast.parse(textwrap.dedent("".join(lines))).body
    except (SyntaxError, ValueError):
        return numbered
    if not isinstance(node, ast.FunctionDef):
        return numbered
    silent = set(range(1, node.body[0].lineno))
    for each in ast.walk(node):
        if isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant):
            silent.update(range(each.lineno, (each.end_lineno or each.lineno) + 1))
    return [line for place, line in enumerate(numbered, 1) if place not in silent]


def _sources(candidate: Any) -> list[Any]:
    """The functions and methods that a candidate is written in; torch's own are not shown."""
    if isinstance(candidate, functools.partial):
        return _sources(candidate.func)
    if inspect.ismethod(candidate):
        candidate = candidate.__self__
    if inspect.isfunction(candidate):
        cells = [cell.cell_contents for cell in candidate.__closure__ or () if _is_full(cell)]
        named = [candidate.__globals__.get(name) for name in candidate.__code__.co_names]
        modules = [each for each in (*cells, *named) if isinstance(each, nn.Module)]
        inner = [source for module in modules for source in _sources(module)]
        return [*dict.fromkeys([candidate, *_called_by(candidate), *inner])]
    parts = candidate.modules() if isinstance(candidate, nn.Module) else [candidate]
    classes = dict.fromkeys(base for part in parts for base in type(part).__mro__)
    own = [each for each in classes if each.__module__.split(".")[0] not in NOT_THEIRS]
    methods = [each for cls in own for each in vars(cls).values() if inspect.isfunction(each)]
    return [*dict.fromkeys([*methods, *(f for each in methods for f in _called_by(each))])]


def _shown_name(path: str) -> str:
    """The name of a file; a cell of a notebook has none that says anything."""
    return "notebook cell" if "ipykernel" in path or "ipython-input" in path else Path(path).name


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _called_by(function: Any) -> list[Any]:
    """The functions of the same file that a function names."""
    named = (function.__globals__.get(name) for name in function.__code__.co_names)
    return [f for f in named if inspect.isfunction(f) and f.__module__ == function.__module__]

"""Typical wrong answers, and what the check must say about them."""


def head_rows(expression: str) -> str:
    """An answer to task 2."""
    return f"def weights_of_head(qkv_weight, head, head_dim):\n    return {expression}"


def added(expression: str) -> str:
    """An answer to task 3."""
    return f"def add_heads(heads, w_out):\n    d = heads.shape[-1]\n    return {expression}"


PRUNE = """\
def prune(module, head):
    result, d = {copied}, module.head_dim
    del result.heads[{head}]
    weight = module.out_proj.weight.detach()
    kept = {kept}
    result.out_proj.weight = nn.Parameter(kept)
    {last}
    return result
"""
RIGHT_PRUNE = {
    "copied": "copy.deepcopy(module)",
    "head": "head",
    "kept": "torch.cat([weight[:, : head * d], weight[:, (head + 1) * d :]], dim=1)",
    "last": "result.out_proj.in_features = kept.shape[1]",
}


def prune(**mistake: str) -> str:
    """The solution of task 5 with one piece replaced."""
    return PRUNE.format(**{**RIGHT_PRUNE, **mistake})


VERDICT = """\
def verdict(differences, size):
    mean = differences.mean().item()
    error = differences.std().item(){per_seed}
    if {nothing}:
        return "no difference found"
    return {sign}
"""
RIGHT_VERDICT = {
    "per_seed": " / len(differences) ** 0.5",
    "nothing": "abs(mean) <= 3 * error or abs(mean) <= size",
    "sign": '"better" if mean < 0 else "worse"',
}


def verdict(**mistake: str) -> str:
    """The solution of task 6 with one piece replaced."""
    return VERDICT.format(**{**RIGHT_VERDICT, **mistake})


def guess(shape: str = "(4, 12)", heads: str = "3", ratio: str = "3") -> str:
    """An answer to task 1."""
    return f"weight_shape = {shape}\nheads_that_change = {heads}\nfull_over_sliced = {ratio}"


WRONG: dict[str, list[tuple[str, str]]] = {
    "Task 1": [
        (guess(shape="(4, 4)"), "reads only its own slice"),
        (guess(shape="(12, 4)"), "the axes are swapped"),
        (guess(heads="1"), "every head reads the whole embedding"),
        (guess(ratio="9"), "one such piece for each head"),
    ],
    "Task 2": [
        (
            head_rows(
                'rearrange(qkv_weight, "(h three d) e -> h three d e", three=3, d=head_dim)[head]'
            ),
            "the order (h three d)",
        ),
        (
            head_rows(
                'rearrange(qkv_weight, "(three d h) e -> h three d e", three=3, d=head_dim)[head]'
            ),
            "pattern (d h)",
        ),
        (
            head_rows(
                "qkv_weight.view(3, -1, qkv_weight.shape[1])"
                "[:, :, head * head_dim : (head + 1) * head_dim]"
            ),
            "you cut columns",
        ),
        (
            head_rows(
                'rearrange(qkv_weight, "(three h d) e -> h d three e", three=3, d=head_dim)[head]'
            ),
            "the three letters come first",
        ),
        (
            head_rows(
                'rearrange(qkv_weight, "(three h d) e -> h three d e", three=3, d=head_dim)'
                "[head - 1]"
            ),
            "heads count from 0",
        ),
    ],
    "Task 3": [
        (added("heads.sum(dim=1) @ w_out[:, :d].mT"), "added before it"),
        (
            added(
                'einsum(heads, rearrange(w_out, "(h d) e -> h e d", d=d), '
                '"b h n d, h e d -> b n e")'
            ),
            "you cut the rows of w_out",
        ),
        (
            added(
                'einsum(heads, rearrange(w_out, "e (d h) -> h e d", d=d), '
                '"b h n d, h e d -> b n e")'
            ),
            "pattern (d h)",
        ),
        (added("heads.sum(dim=1)"), "expected shape"),
    ],
    "Task 4": [
        ("errors_of_1_3_6 = [0.75, 0.25, -0.5]\none_wide_head = 0.75", "an error is not"),
        ("errors_of_1_3_6 = [0.25, 0.75, 1.0]\none_wide_head = 0.75", "the part that is served"),
        ("errors_of_1_3_6 = [0.75, 0.25, 0]\none_wide_head = 0.5", "width does not count"),
    ],
    "Task 5": [
        (prune(copied="module"), "work on a copy"),
        (prune(kept="weight"), "cut its columns"),
        (prune(kept="weight[:, :-d]"), "do not fit the heads that are left"),
        (prune(last="result.out_proj.bias.data.zero_()"), "belongs to no head"),
        (
            prune(head="0", kept="weight[:, d:]"),
            "head 0 is gone",
        ),
        (prune(head="0"), "did the other heads keep"),
    ],
    "Task 6": [
        (verdict(per_seed=""), "square root of the number of seeds"),
        (verdict(sign='"better" if mean > 0 else "worse"'), "the larger error"),
        (verdict(nothing="mean <= 3 * error or mean <= size"), "its absolute value"),
        (verdict(nothing="abs(mean) <= size"), "within 3 standard errors"),
        (verdict(nothing="abs(mean) <= 3 * error"), "both conditions must hold"),
    ],
}

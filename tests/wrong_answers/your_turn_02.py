"""Typical wrong answers, and what the check must say about them."""

MULTI_HEAD = """\
def multi_head(x, qkv_weight, out_weight, head_dim):
    packed = einsum(x, qkv_weight, "b n e, f e -> b n f")
    q, k, v = rearrange(packed, "b n (three h d) -> three b h n d", three=3, d={width})
    scores = einsum(q, k, "b h i d, b h j d -> b h i j") / {scale} ** 0.5
    values = einsum(scores.softmax(dim={axis}), v, "b h i j, b h j d -> b h i d")
    merged = {merge}
    return merged{project}
"""
RIGHT = {
    "width": "head_dim",
    "scale": "head_dim",
    "axis": "-1",
    "merge": 'rearrange(values, "b h n d -> b n (h d)")',
    "project": " @ out_weight.T",
}


def multi_head(**mistake: str) -> str:
    """The solution of task 5 with one piece replaced."""
    return MULTI_HEAD.format(**{**RIGHT, **mistake})


WRONG: dict[str, list[tuple[str, str]]] = {
    "Task 1": [
        ("head_1_token_1 = [4, 5]\nsplit_copies = False", "view(b, h, n, d) would give"),
        ("head_1_token_1 = [8, 9]\nsplit_copies = True", "only changes the strides"),
    ],
    "Task 2": [
        (
            "def split(x, head_dim):\n"
            "    return x.view(len(x), x.shape[-1] // head_dim, x.shape[1], head_dim)",
            "view alone scrambles the tokens",
        ),
        (
            "def split(x, head_dim):\n"
            "    return x.view(len(x), x.shape[1], x.shape[-1] // head_dim, head_dim)",
            "heads must come before tokens",
        ),
        (
            'def split(x, head_dim):\n    return rearrange(x, "b n (d h) -> b h n d", d=head_dim)',
            "a head owns neighbours",
        ),
    ],
    "Task 3": [
        (
            "def merge(heads):\n"
            "    b, h, n, d = heads.shape\n"
            "    return heads.reshape(b, n, h * d)",
            "the tokens are scrambled",
        ),
    ],
    "Task 4": [
        (
            "def unpack(packed, head_dim):\n"
            '    return rearrange(packed, "b n (h three d) -> three b h n d", three=3, d=head_dim)',
            "the order (h three d)",
        ),
        (
            "def unpack(packed, head_dim):\n    return packed.chunk(3, dim=-1)",
            "expected three of",
        ),
        (
            "def unpack(packed, head_dim):\n"
            "    b, n, width = packed.shape\n"
            "    shape = b, width // 3 // head_dim, n, head_dim\n"
            "    return [part.reshape(shape) for part in packed.chunk(3, dim=-1)]",
            "queries: view scrambles the tokens",
        ),
    ],
    "Task 5": [
        (multi_head(width="x.shape[-1]", scale="x.shape[-1]"), "one wide head"),
        (multi_head(scale="x.shape[-1]"), "scaled by the whole width"),
        (multi_head(scale="1"), "the scale is missing"),
        (multi_head(project=""), "the output projection is missing"),
        (multi_head(project=" @ out_weight"), "the output weight is transposed"),
        (multi_head(scale="(head_dim**2)"), "divided by d"),
        (multi_head(merge='rearrange(values, "b h n d -> b n (d h)")'), "the order (d h)"),
        (multi_head(axis="-2"), "is the softmax over the last axis"),
        (multi_head(merge="values.reshape(x.shape)"), "split or merge mixes tokens"),
    ],
}

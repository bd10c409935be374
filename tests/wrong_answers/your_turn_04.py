"""Typical wrong answers, and what the check must say about them."""

ATTEND = """\
def attend(q, k, v):
    q, k, v = split(q), split(k), split(v)
    tokens = q.shape[2]
    scores = q @ k.mT / math.sqrt({scale})
    future = torch.ones(tokens, tokens, device=q.device).triu({diagonal}).bool()
    weights = scores.masked_fill(future, -torch.inf).softmax(dim={axis})
    return {merge}
"""
RIGHT_ATTEND = {
    "scale": "d",
    "diagonal": "1",
    "axis": "-1",
    "merge": 'rearrange(weights @ v, "b h n d -> b n (h d)")',
}


def attend(**mistake: str) -> str:
    """The solution of task 2 with one piece replaced."""
    return ATTEND.format(**{**RIGHT_ATTEND, **mistake})


def allowed(expression: str) -> str:
    """An answer to task 3."""
    return (
        "def allowed(real):\n"
        "    tokens = real.shape[1]\n"
        "    past = causal_mask(tokens, tokens, device=real.device)\n"
        f"    return {expression}"
    )


def corner(expression: str) -> str:
    """An answer to task 4."""
    return f"def corner(queries, keys):\n    return {expression}"


def weigh(fill: str, last: str = "") -> str:
    """An answer to task 5."""
    return (
        "def weigh(scores, mask):\n"
        f"    return scores.masked_fill(~mask, {fill}).softmax(dim=-1){last}"
    )


DIFFERS = """\
def differs_in_training(module, x):
    examined = {copied}
    for part in examined.modules():
        if isinstance(part, nn.Dropout):
            part.p = {p}
    return {answer}
"""
RIGHT_DIFFERS = {
    "copied": "copy.deepcopy(module)",
    "p": "0.0",
    "answer": "not torch.allclose(examined.train()(x), examined.eval()(x), atol=1e-6)",
}


def differs(**mistake: str) -> str:
    """The solution of task 6 with one piece replaced."""
    return DIFFERS.format(**{**RIGHT_DIFFERS, **mistake})


RESTORED = """\
def differs_in_training(module, x):
    dropouts = [part for part in module.modules() if isinstance(part, nn.Dropout)]
    rates = [part.p for part in dropouts]
    for part in dropouts:
        part.p = 0.0
    differs = not torch.allclose(module.train()(x), module.eval()(x), atol=1e-6)
    for part, rate in zip(dropouts, rates, strict=True):
        part.p = rate
    return differs
"""


def guess(
    tokens: str = "[0, 1, 2]", first: str = "merge_without_transpose", one: str = "True"
) -> str:
    """An answer to task 1."""
    return (
        f"tokens_in_output_0 = {tokens}\nfirst_finding = {first!r}\nhealthy_with_one_head = {one}"
    )


EMPTY_ROWS = " * mask.any(dim=-1, keepdim=True)"

WRONG: dict[str, list[tuple[str, str]]] = {
    "Task 1": [
        (guess(tokens="[0, 0, 0]"), "that is the right merge"),
        (guess(tokens="[0, 5, 10]"), "the pieces of token 0 in memory"),
        (guess(first="sees_future"), "it is a symptom"),
        (guess(first="split_without_transpose"), "merge_without_transpose"),
        (guess(one="False"), "the axis h has length 1"),
    ],
    "Task 2": [
        (attend(scale="e"), "scale_sqrt_embed_dim"),
        (
            attend(merge="(weights @ v).reshape(len(q), tokens, e)"),
            "merge_without_transpose",
        ),
        (
            attend(scale="e", merge="(weights @ v).reshape(len(q), tokens, e)"),
            "scale_sqrt_embed_dim",
        ),
        (attend(diagonal="2"), "causal_off_by_one"),
        (attend(axis="-2"), "softmax_over_queries"),
        (attend(merge="weights @ v"), "expected (2, 5, 12)"),
    ],
    "Task 3": [
        (allowed("past"), "one mask for each sample"),
        (allowed("real[:, None, None, :] & ~past"), "a real token does not see itself"),
        (allowed("~real[:, None, None, :] & past"), "a real token does not see itself"),
        (allowed("real[:, None, None, :] | past"), "joined by &, not by |"),
        (allowed("past.expand(len(real), 1, tokens, tokens)"), "padding_leaks"),
        (allowed("real[:, None, :, None] & past"), "padding_leaks"),
        (allowed("(real[:, None, None, :] & past).float()"), "a mask is boolean"),
        (
            allowed("real[:, None, None, :] & torch.ones_like(past).tril(1)"),
            "query 0 sees key 1",
        ),
    ],
    "Task 4": [
        (corner("torch.ones(queries, keys).tril().bool()"), "the upper left corner"),
        (
            corner("torch.ones(queries, keys).tril(keys - queries + 1).bool()"),
            "one diagonal too many",
        ),
        (corner("torch.ones(queries, keys).bool()"), "nothing is forbidden"),
        (
            corner("torch.ones(queries, keys).tril(keys // 2 if keys > queries else 0).bool()"),
            "query i stands at position",
        ),
    ],
    "Task 5": [
        (weigh("-torch.inf"), "nan_when_all_masked"),
        (weigh("-1e9", EMPTY_ROWS), "overflow_in_half"),
        (weigh("torch.finfo(scores.dtype).min"), "an empty row is not zeros"),
        (weigh("0.0", EMPTY_ROWS), "mask_times_zero"),
    ],
    "Task 6": [
        (differs(p="part.p"), "the right layer is accused"),
        (
            differs(answer="not torch.allclose(examined.eval()(x), examined(x), atol=1e-6)"),
            "the forgetful layer passes",
        ),
        (differs(copied="module"), "the dropout of the module is gone"),
        (RESTORED, "the module is in another mode now"),
        (
            "def differs_in_training(module, x):\n    return diagnose(module, e, h, causal=True).healthy",
            "the right layer is accused",
        ),
    ],
}

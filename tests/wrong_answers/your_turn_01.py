"""Typical wrong answers, and what the check must say about them."""

CAUSAL = """\
def causal_attention(query, key, value, offset):
    scores = einsum(query, key, "b i d, b j d -> b i j") / query.shape[-1] ** 0.5
    positions = rearrange(torch.arange(query.shape[1]), "i -> i 1") + {offset}
    visible = torch.arange(key.shape[1]) {relation} positions
    weights = {weights}
    return einsum(weights, value, "b i j, b j v -> b i v")
"""
RIGHT = {
    "offset": "offset",
    "relation": "<=",
    "weights": "scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)",
}


def causal(**mistake: str) -> str:
    """The solution of task 5 with one piece replaced."""
    return CAUSAL.format(**{**RIGHT, **mistake})


def scores(expression: str) -> str:
    """An answer to task 2."""
    return f"def scaled_scores(query, key):\n    return {expression}"


def masked(expression: str) -> str:
    """An answer to task 3."""
    return f"def masked_softmax(scores, mask):\n    return {expression}"


WRONG: dict[str, list[tuple[str, str]]] = {
    "Task 1": [
        ("weights_shape = (2, 5, 3)\noutput_shape = (2, 3, 6)", "so i first"),
        ("weights_shape = (2, 3, 5)\noutput_shape = (2, 3, 4)", "not d"),
        ("weights_shape = (2, 3, 5)\noutput_shape = (2, 5, 6)", "the number of keys"),
    ],
    "Task 2": [
        (scores("query @ key.mT"), "the scale is missing"),
        (scores("key @ query.mT / query.shape[-1] ** 0.5"), "the axes are swapped"),
        (scores("query @ key.mT / query.shape[-1]"), "but divided by 4.00"),
        (scores("query @ key.mT / 2"), "right for d = 4 only"),
        (scores("(query @ key.mT).softmax(dim=-1)"), "the softmax is task 3"),
    ],
    "Task 3": [
        (masked("scores.softmax(dim=-1)"), "the mask is not used"),
        (masked("scores.masked_fill(mask, -torch.inf).softmax(dim=-1)"), "the mask is inverted"),
        (masked("(scores + ~mask * -torch.inf).softmax(dim=-1)"), "0 times -inf is NaN"),
        (masked("(scores * mask).softmax(dim=-1)"), "still has weight"),
        (masked("scores.softmax(dim=-1) * mask"), "mask before the softmax"),
        (
            masked("scores.masked_fill(~mask, -torch.inf).softmax(dim=1)"),
            "the softmax runs over the keys",
        ),
    ],
    "Task 4": [
        ("def safe_softmax(scores):\n    return scores.softmax(dim=-1)", "NaN in the output"),
        (
            "def safe_softmax(scores):\n    return scores.softmax(dim=-1).nan_to_num(0.0)",
            "its gradient is NaN",
        ),
        (
            "def safe_softmax(scores):\n"
            "    empty = (scores == -torch.inf).all(dim=-1, keepdim=True)\n"
            "    return scores.masked_fill(empty, 0.0).softmax(dim=-1)",
            "not an even mixture",
        ),
        (
            "def safe_softmax(scores):\n"
            "    empty = (scores == -torch.inf).any(dim=-1, keepdim=True)\n"
            "    return scores.masked_fill(empty, 0.0).softmax(dim=-1).masked_fill(empty, 0.0)",
            "not if any of them is",
        ),
    ],
    "Task 5": [
        (causal(relation="<= 9 +"), "but depends on [0, 1, 2, 3, 4]"),
        (causal(offset="0"), "but depends on [0]"),
        (causal(offset="(-offset)"), "the offset on the wrong side"),
        (causal(relation="<"), "but depends on [0, 1]"),
        (causal(offset="offset + 1"), "but depends on [0, 1, 2, 3]"),
        (causal(weights="scores.softmax(dim=-1) * visible"), "zeroing after the softmax"),
        (
            causal(weights="(scores * 3).masked_fill(~visible, -torch.inf).softmax(dim=-1)"),
            "check the scale",
        ),
    ],
}

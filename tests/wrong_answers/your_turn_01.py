"""Typical wrong answers, and what the check must say about them."""

WRONG: dict[str, list[tuple[str, str]]] = {
    "Task 1": [
        ("weights_shape = (2, 5, 3)\noutput_shape = (2, 3, 6)", "so i first"),
        ("weights_shape = (2, 3, 5)\noutput_shape = (2, 3, 4)", "not d"),
    ],
    "Task 2": [
        (
            'def scaled_scores(query, key):\n    return einsum(query, key, "b i d, b j d -> b i j")',
            "the scale is missing",
        ),
        (
            "def scaled_scores(query, key):\n"
            '    return einsum(query, key, "b i d, b j d -> b j i") / query.shape[-1] ** 0.5',
            "the axes are swapped",
        ),
        (
            "def scaled_scores(query, key):\n"
            '    return einsum(query, key, "b i d, b j d -> b i j") / query.shape[-1]',
            "it is the square root",
        ),
    ],
    "Task 3": [
        (
            "def masked_softmax(scores, mask):\n"
            "    return scores.masked_fill(mask, -torch.inf).softmax(dim=-1)",
            "the mask is inverted",
        ),
        (
            "def masked_softmax(scores, mask):\n    return (scores * mask).softmax(dim=-1)",
            "still has weight",
        ),
        (
            "def masked_softmax(scores, mask):\n    return scores.softmax(dim=-1) * mask",
            "mask before the softmax",
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
    ],
    "Task 5": [
        (
            "def causal_attention(query, key, value, offset):\n"
            "    return torch.nn.functional.scaled_dot_product_attention(query, key, value)",
            "the future leaks",
        ),
        (
            "def causal_attention(query, key, value, offset):\n"
            "    return torch.nn.functional.scaled_dot_product_attention(\n"
            "        query, key, value, is_causal=True\n"
            "    )",
            "is the offset used",
        ),
    ],
}

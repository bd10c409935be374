"""Typical wrong answers, and what the check must say about them."""

PRUNE = """\
def prune_head(attention, index):
    old, d = attention.out_proj, attention.head_dim
    columns = torch.ones(old.in_features, dtype=torch.bool)
    columns[{cut}] = False
    new = nn.Linear(int(columns.sum()), old.out_features, bias={bias})
    new.weight.data.copy_(old.weight.data[:, columns])
    {copy_bias}
    attention.out_proj = new
    del attention.heads[index]
"""
RIGHT = {
    "cut": "index * d : (index + 1) * d",
    "bias": "True",
    "copy_bias": "new.bias.data.copy_(old.bias.data)",
}


def prune(**mistake: str) -> str:
    """A solution of task 5 with one piece replaced."""
    return PRUNE.format(**{**RIGHT, **mistake})


def pack(expression: str) -> str:
    """An answer to task 2."""
    return f"def pack(weights):\n    return {expression}"


def add(pattern: str, blocks: str = "") -> str:
    """An answer to task 3."""
    return (
        "def contributions(heads, out_weight):\n"
        f'    blocks = rearrange(out_weight, "{pattern}", d=heads.shape[-1])\n'
        f'    return einsum(heads, blocks, "b h n d, h e d -> h b n e"){blocks}'
    )


def freeze(body: str) -> str:
    """An answer to task 4."""
    return f"def freeze_head(attention, index):\n    {body}"


WRONG: dict[str, list[tuple[str, str]]] = {
    "Task 1": [
        ("smallest_error = 0.75\nwidth_helps = False", "the bound for one head"),
        ("smallest_error = 0.25\nwidth_helps = True", "the bound counts softmaxes"),
    ],
    "Task 2": [
        (pack('rearrange(weights, "three h d e -> (h three d) e")'), "the order (h three d)"),
        (pack('rearrange(weights, "three h d e -> (three d h) e")'), "the order (three d h)"),
        (pack('rearrange(weights, "three h d e -> three (h d) e")'), "expected shape (36, 12)"),
    ],
    "Task 3": [
        (add("(h d) e -> h e d"), "a head owns columns"),
        (add("e (d h) -> h e d"), "dealt out as (d h)"),
        (add("e (h d) -> h e d", " * 2"), "do not sum to the result"),
        (add("e (h d) -> h e d", ".flip(0)"), "part 0 is not what head 0 adds"),
    ],
    "Task 4": [
        (
            freeze("attention.requires_grad_(False)\n    attention.out_proj.requires_grad_(True)"),
            "head 0 no longer learns",
        ),
        (freeze("attention.heads[index - 1].requires_grad_(False)"), "heads count from 0"),
        (
            freeze("attention.heads[index].q_proj.requires_grad_(False)"),
            "still changed by training",
        ),
        (
            freeze(
                "for p in attention.heads[index].parameters():\n"
                "        p.register_hook(torch.zeros_like)"
            ),
            "a gradient of zero is not enough",
        ),
    ],
    "Task 5": [
        (
            "def prune_head(attention, index):\n    del attention.heads[index]",
            "out_proj must read 8",
        ),
        (prune(cut="-d:"), "were its own columns of W_O cut"),
        (prune(bias="False", copy_bias="pass"), "the bias of out_proj is lost"),
        (prune(copy_bias="pass"), "bias was redrawn"),
    ],
}

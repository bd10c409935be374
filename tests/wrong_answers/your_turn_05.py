"""Typical wrong answers, and what the check must say about them."""

RIGHT_GUESS = {
    "score_mib": "512",
    "twice_the_tokens": "4",
    "half_the_heads_bytes": "0.5",
    "half_the_heads_flops": "1",
    "overtakes_at": "2048",
}


def guess(**mistake: str) -> str:
    """The predictions of task 1 with one replaced."""
    return "\n".join(f"{name} = {value}" for name, value in {**RIGHT_GUESS, **mistake}.items())


def cost(
    flops: str = "4 * n * tokens",
    apart: str = "size * (4 * tokens + 4 * table)",
    fused: str = "size * 4 * tokens",
) -> str:
    """An answer to task 2."""
    return (
        "def cost(b, n, h, d, size):\n"
        "    tokens, table = b * n * h * d, b * h * n * n\n"
        f"    return {flops}, {apart}, {fused}"
    )


PACK = """\
def pack(q_proj, k_proj, v_proj):
    layers = {layers}
    packed = nn.Linear({sizes}, bias={has_bias})
    with torch.no_grad():
        packed.weight.copy_(torch.cat([layer.weight{turned} for layer in layers], dim={axis}))
        {bias}
    return packed
"""
RIGHT_PACK = {
    "layers": "q_proj, k_proj, v_proj",
    "sizes": "q_proj.in_features, 3 * q_proj.out_features",
    "has_bias": "True",
    "turned": "",
    "axis": "0",
    "bias": "packed.bias.copy_(torch.cat([layer.bias for layer in layers]))",
}


def pack(**mistake: str) -> str:
    """The solution of task 3 with one piece replaced."""
    return PACK.format(**{**RIGHT_PACK, **mistake})


JOIN = """\
def join(one, other):
    peak = {peak}
    total = summed = 0
    for old_peak, old_total, old_summed in (one, other):
        shrink = {shrink}
        total = total + {total}
        summed = summed + {summed}
    return peak, total, {last}
"""
RIGHT_JOIN = {
    "peak": "torch.maximum(one[0], other[0])",
    "shrink": "torch.exp(old_peak - peak)",
    "total": "shrink * old_total",
    "summed": "shrink * old_summed",
    "last": "summed",
}


def join(**mistake: str) -> str:
    """The solution of task 4 with one piece replaced."""
    return JOIN.format(**{**RIGHT_JOIN, **mistake})


TILED = """\
def tiled(q, k, v, tile):
    n, d = q.shape[-2:]
    queries = torch.arange(n, device=q.device)[:, None]
    peak = torch.full_like(q[..., :1], -torch.inf)
    total, summed = torch.zeros_like(peak), torch.zeros_like(q)
    for start in range(0, n, tile):
        keys = slice(start, {stop})
        scores = q @ k[:, :, keys].mT * {scale}
        future = torch.arange({first}, n, device=q.device)[: scores.shape[-1]] > queries
        {mask}
        new_peak = {peak}
        weights, shrink = torch.exp(scores - new_peak), torch.exp(peak - new_peak)
        total = shrink * total + weights.sum(dim=-1, keepdim=True)
        summed = {shrink} * summed + weights @ v[:, :, keys]
        peak = new_peak
    return summed / total
"""
RIGHT_TILED = {
    "stop": "min(start + tile, n)",
    "scale": "d**-0.5",
    "first": "start",
    "mask": "scores = scores.masked_fill(future, -torch.inf)",
    "peak": "torch.maximum(peak, scores.amax(dim=-1, keepdim=True))",
    "shrink": "shrink",
}


def tiled(**mistake: str) -> str:
    """The solution of task 5 with one piece replaced."""
    return TILED.format(**{**RIGHT_TILED, **mistake})


def whole(scale: str = "d**-0.5") -> str:
    """An answer to task 5 that holds all scores at once."""
    return (
        "def tiled(q, k, v, tile):\n"
        f"    scores = q @ k.mT * {scale}\n"
        "    future = torch.ones_like(scores, dtype=torch.bool).triu(1)\n"
        "    return scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ v"
    )


JOINED_PARTS = """\
def tiled(q, k, v, tile):
    n = q.shape[2]
    done = None
    for start in range(0, n, tile):
        scores = q @ k[:, :, start : start + tile].mT * d**-0.5
        future = torch.arange(start, start + scores.shape[-1]) > torch.arange(n)[:, None]
        scores = scores.masked_fill(future, -torch.inf)
        part = part_of(scores, v[:, :, start : start + tile])
        done = part if done is None else join(done, part)
    return done[2] / done[1]
"""


def needed(
    distance: str = "row * tile - (column * tile + tile - 1)",
    columns: str = "row + 1",
    sign: str = "<",
) -> str:
    """An answer to task 6."""
    return (
        "def needed(n, tile, window):\n"
        "    return {\n"
        "        (row, column)\n"
        "        for row in range(n // tile)\n"
        f"        for column in range({columns})\n"
        f"        if {distance} {sign} window\n"
        "    }"
    )


WRONG: dict[str, list[tuple[str, str]]] = {
    "Task 1": [
        (guess(score_mib="32"), "every head has a matrix of its own"),
        (guess(score_mib="256"), "one byte a number"),
        (guess(twice_the_tokens="2"), "both axes of the matrix grow"),
        (guess(half_the_heads_bytes="1"), "one matrix a head"),
        (guess(half_the_heads_flops="0.5"), "twice as many features"),
        (guess(overtakes_at="1024"), "they cost half as much"),
    ],
    "Task 2": [
        (cost(flops="2 * n * tokens"), "half of what PyTorch counts"),
        (cost(flops="4 * b * n * n * d"), "that is one head"),
        (cost(apart="4 * tokens + 4 * table"), "numbers were counted and not bytes"),
        (cost(apart="size * (4 * tokens + 2 * table)"), "the softmax moves the matrix too"),
        (cost(apart="size * (4 * tokens + 3 * table)"), "the matrix moves four times"),
        (cost(fused="size * (4 * tokens + 4 * table)"), "never writes the matrix"),
        (cost(fused="size * 3 * tokens"), "the output is written as well"),
    ],
    "Task 3": [
        (pack(layers="k_proj, q_proj, v_proj"), "qkv_order_swapped"),
        (pack(layers="q_proj, k_proj, k_proj"), "projection_reused"),
        (pack(turned=".T"), "weight_transposed"),
        (
            pack(sizes="3 * q_proj.in_features, q_proj.out_features", axis="1", bias="pass"),
            "the weights lie side by side",
        ),
        (pack(has_bias="False", bias="pass"), "yours has none"),
        (pack(bias="pass"), "nn.Linear made it at random"),
        (pack(bias="packed.bias.zero_()"), "bias_missing"),
    ],
    "Task 4": [
        (join(total="old_total", summed="old_summed"), "added as they are"),
        (join(shrink="torch.exp(peak - old_peak)"), "the sign is turned"),
        (join(summed="old_summed"), "summed was not"),
        (join(last="summed / total"), "summed was divided already"),
        (join(peak="torch.minimum(one[0], other[0])"), "the larger of the two"),
        (
            join(shrink="torch.exp(old_peak) / torch.exp(peak)"),
            "subtract the peaks first",
        ),
    ],
    "Task 5": [
        (tiled(mask="pass"), "not causal"),
        (tiled(shrink="1"), "wrong with several"),
        (tiled(first="0"), "the doctor finds"),
        (tiled(scale="1"), "scale_missing"),
        (tiled(peak="scores.amax(dim=-1, keepdim=True)"), "not finite"),
        (JOINED_PARTS, "not finite"),
        (whole(), "that is no tile"),
        (whole("e**-0.5"), "scale_sqrt_embed_dim"),
    ],
    "Task 6": [
        (needed(columns="n // tile"), "lie in the future"),
        (needed(distance="(row - column) * tile"), "is skipped"),
        (needed(sign="<="), "is visited for nothing"),
        (needed(distance="row - column"), "is visited for nothing"),
        (
            "def needed(n, tile, window):\n    return by_mask(n, tile, window)",
            "positions are plain integers",
        ),
    ],
}

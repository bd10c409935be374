"""Typical wrong answers, and what the check must say about them."""

RIGHT_GUESS = {
    "cache_mib": "1024",
    "without_sharing_mib": "4096",
    "tokens_with_cache": "14",
    "tokens_without_cache": "95",
}


def guess(**mistake: str) -> str:
    """The predictions of task 1 with one replaced."""
    return "\n".join(f"{name} = {value}" for name, value in {**RIGHT_GUESS, **mistake}.items())


def cache_bytes(expression: str) -> str:
    """An answer to task 2."""
    return (
        "def cache_bytes(module, layers, batch, tokens):\n"
        "    size = module.k_proj.weight.element_size()\n"
        "    k, d = module.num_kv_heads, module.head_dim\n"
        f"    return {expression}"
    )


STEP = """\
def step(module, x, past):
    d, groups = module.head_dim, module.num_heads // module.num_kv_heads
    query = rearrange(module.q_proj(x), "b i (h d) -> b h i d", d=d)
    new = [
        rearrange(proj(x), "b j (k d) -> b k j d", d=d)
        for proj in (module.k_proj, module.v_proj)
    ]
    {order}
    keys, values = {kept}
    seen = {seen}
    wide_keys, wide_values = ({repeated} for part in seen)
    scores = query @ wide_keys.mT * {scale} ** -0.5
    heads = scores.softmax(dim=-1) @ wide_values
    output = module.out_proj(rearrange(heads, "b h i d -> b i (h d)"))
    return output, {last}
"""
RIGHT_STEP = {
    "order": "pairs = [torch.cat(pair, dim=2) for pair in zip(past, new, strict=True)]",
    "kept": "pairs",
    "seen": "keys, values",
    "repeated": "part.repeat_interleave(groups, dim=1)",
    "scale": "d",
    "last": "(keys, values)",
}


def step(**mistake: str) -> str:
    """A right answer to task 3 with one piece replaced."""
    return STEP.format(**{**RIGHT_STEP, **mistake})


def chunk_mask(
    causal: str = "causal_mask(new, past + new, query_offset=past)",
    real: str = "places >= (longest - lengths)[:, None]",
    last: str = "real[:, None, None, :] & causal",
) -> str:
    """An answer to task 4."""
    return (
        "def chunk_mask(lengths, longest, past, new):\n"
        "    places = torch.arange(past + new)\n"
        f"    causal = {causal}\n"
        f"    real = {real}\n"
        f"    return {last}"
    )


CHANCES = """\
def chances(logits, temperature=1.0, top_k=None):
    scaled = {scaled}
    if top_k is not None:
        {drop}
    return {last}
"""
RIGHT_CHANCES = {
    "scaled": "logits / temperature",
    "drop": "lowest = scaled.topk(min(top_k, scaled.shape[-1])).values[:, -1:]; "
    "scaled = scaled.masked_fill(scaled < lowest, -torch.inf)",
    "last": "scaled.softmax(dim=-1)",
}


def chances(**mistake: str) -> str:
    """A right answer to task 5 with one piece replaced."""
    return CHANCES.format(**{**RIGHT_CHANCES, **mistake})


SCORE = """\
def induction_score(weights, tokens):
    places = torch.arange(tokens.shape[1])
    copies = (tokens[:, :, None] == tokens[:, None, :]) & {earlier}
    targets = {targets}
    found = einsum(weights, targets.to(weights), "b h i j, b i j -> h b i")
    return {average}
"""
RIGHT_SCORE = {
    "earlier": "(places < places[:, None])",
    "targets": "copies.roll(1, dims=-1)",
    "average": "found[:, targets.any(dim=-1)].mean(dim=-1)",
}


def score(**mistake: str) -> str:
    """The solution of task 6 with one piece replaced."""
    return SCORE.format(**{**RIGHT_SCORE, **mistake})


TOP_TWO = "lowest = scaled.topk(top_k).values[:, -1:]; "

WRONG: dict[str, list[tuple[str, str]]] = {
    "Task 1": [
        (guess(cache_mib="512"), "two tensors a layer"),
        (guess(cache_mib="32"), "that is one layer"),
        (guess(cache_mib="4096"), "query heads are not cached"),
        (guess(without_sharing_mib="1024"), "proportional to the key/value heads"),
        (guess(tokens_with_cache="15"), "read by nobody"),
        (guess(tokens_without_cache="150"), "only at the end"),
    ],
    "Task 2": [
        (
            cache_bytes("layers * 2 * batch * module.num_heads * tokens * d * size"),
            "all query heads",
        ),
        (cache_bytes("layers * batch * k * tokens * d * size"), "keys and values"),
        (cache_bytes("layers * 2 * batch * k * tokens * d"), "numbers were counted"),
        (cache_bytes("2 * batch * k * tokens * d * size"), "a cache of its own"),
        (cache_bytes("layers * 2 * batch * k * tokens * d * 4"), "bfloat16 takes two bytes"),
        (
            cache_bytes(
                "layers * 2 * batch * k * tokens * (module.embed_dim // module.num_heads) * size"
            ),
            "take module.head_dim",
        ),
    ],
    "Task 3": [
        (
            step(repeated="part.repeat(1, groups, 1, 1)"),
            "kv_heads_tiled",
        ),
        (step(seen="past"), "the doctor finds"),
        (step(seen="new"), "ignores_past"),
        (step(scale="module.embed_dim"), "scale_sqrt_embed_dim"),
        (
            step(order="pairs = [torch.cat(pair, dim=2) for pair in zip(new, past, strict=True)]"),
            "the new key stands before the old ones",
        ),
        (step(last="new"), "the old ones and the new"),
        (
            step(last="[part.repeat_interleave(groups, dim=1) for part in seen]"),
            "kept once for each query head",
        ),
    ],
    "Task 4": [
        (
            chunk_mask(causal="torch.ones(new, past + new).tril().bool()"),
            "the first new query stands at place 3",
        ),
        (chunk_mask(causal="torch.ones(new, past + new).bool()"), "each other's future"),
        (
            chunk_mask(real="torch.ones(len(lengths), past + new).bool()"),
            "the filler is read",
        ),
        (
            chunk_mask(last="(places < lengths[:, None])[:, None, None] & causal"),
            "tokens behind the prompt are hidden",
        ),
        (
            chunk_mask(real="places >= (past + new - lengths)[:, None]"),
            "the longest prompt has no filler",
        ),
    ],
    "Task 5": [
        (chances(scaled="logits * temperature"), "made the chances flatter"),
        (
            chances(scaled="logits", last="scaled.softmax(dim=-1) / temperature"),
            "before the softmax",
        ),
        (chances(scaled="logits.softmax(dim=-1)"), "without top_k"),
        (
            chances(drop=TOP_TWO + "scaled = scaled * (scaled >= lowest)"),
            "a logit of 0 is no chance of 0",
        ),
        (
            chances(
                drop=TOP_TWO + "return scaled.softmax(dim=-1) * (scaled >= lowest)",
            ),
            "no longer sum to one",
        ),
        (
            chances(
                drop="scaled = scaled.masked_fill(scaled < scaled.flatten().topk(top_k).values[-1], "
                "-torch.inf)"
            ),
            "two tokens a row",
        ),
        (chances(scaled="logits.div_(temperature)"), "the logits were overwritten"),
        (
            chances(
                scaled="logits / temperature if temperature != 1 else logits",
                drop=TOP_TWO + "scaled[scaled < lowest] = -torch.inf",
            ),
            "the logits were overwritten",
        ),
    ],
    "Task 6": [
        (score(targets="copies"), "the copy itself scores highest"),
        (score(average="found.mean(dim=(1, 2))"), "you average over all of them"),
        (
            score(average="found.sum(dim=(1, 2)) / targets.sum()"),
            "two targets",
        ),
        (
            score(earlier="(places <= places[:, None])"),
            "its own earlier copy",
        ),
    ],
}

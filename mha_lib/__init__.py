"""Multi-head attention in einops and PyTorch, built step by step in the book of the same repository."""

from mha_lib import convert
from mha_lib.attention import BackendChoice, attention, choose_backend
from mha_lib.cache import KVCache
from mha_lib.doctor import diagnose
from mha_lib.explore import explore_attention
from mha_lib.explore_split import explore_split
from mha_lib.heads import merge_heads, split_heads
from mha_lib.masks import alibi_bias, causal_mask, document_mask, padding_mask, sliding_window_mask
from mha_lib.multihead import MultiHeadAttention
from mha_lib.plot import plot_attention
from mha_lib.reference import AttentionOutput, reference_attention
from mha_lib.rotary import RotaryEmbedding
from mha_lib.simple import SimpleMultiHeadAttention
from mha_lib.split import SplitMultiHeadAttention

__version__ = "0.1.0"

__all__ = [
    "AttentionOutput",
    "BackendChoice",
    "KVCache",
    "MultiHeadAttention",
    "RotaryEmbedding",
    "SimpleMultiHeadAttention",
    "SplitMultiHeadAttention",
    "alibi_bias",
    "attention",
    "causal_mask",
    "choose_backend",
    "convert",
    "diagnose",
    "document_mask",
    "explore_attention",
    "explore_split",
    "merge_heads",
    "padding_mask",
    "plot_attention",
    "reference_attention",
    "sliding_window_mask",
    "split_heads",
]

"""The model of nanoGPT (github.com/karpathy/nanoGPT, model.py) in PyTorch, with which `bench_train.py` compares ours.

It has learned positions, LayerNorm, GELU, fused causal attention, no biases, and one matrix for embedding and head.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """One layer: attention and a feed-forward network of width `hidden`, each after a LayerNorm."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        linear = functools.partial(nn.Linear, bias=False)
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.c_attn, self.c_proj = linear(width, 3 * width), linear(width, width)
        self.c_fc, self.c_out = linear(width, hidden), linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [batch, positions, width] of the residual stream, of the same shape after the layer."""
        B, T, C = x.shape
        qkv = self.c_attn(self.ln_1(x)).split(C, dim=2)
        q, k, v = (y.view(B, T, self.heads, C // self.heads).transpose(1, 2) for y in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x))))


class GPT(nn.Module):
    """A decoder of `layers` blocks for sequences of at most `length` tokens."""

    def __init__(self, vocab: int, length: int, layers: int, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.h = nn.ModuleList([Block(width, heads, hidden) for _ in range(layers)])
        self.ln_f = nn.LayerNorm(width, bias=False)
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.lm_head.weight = self.wte.weight
        # nanoGPT draws all matrices from a normal distribution of this standard deviation.
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of `targets` given `tokens`, both int64 [batch, positions], in nats per token."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))

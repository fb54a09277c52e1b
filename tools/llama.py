"""Our base model in PyTorch, written as PyTorch users would write it, with which `bench_train.py` compares ours.

It has the architecture of `configs/base.py`: RMSNorm, rotary positions, QK-norm, SwiGLU, fused causal attention, no
biases, one matrix for embedding and head. With the same sizes it has the same number of parameters.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional as F


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [batch, heads, positions, head size] with each pair (i, i + half) turned by its angle, in the dtype of x."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Block(nn.Module):
    """One layer: attention and a gated feed-forward network of width `hidden`, each after an RMSNorm."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        linear, norm = functools.partial(nn.Linear, bias=False), functools.partial(nn.RMSNorm, eps=eps)
        self.heads = heads
        self.attention_norm, self.mlp_norm = norm(width), norm(width)
        self.q_norm, self.k_norm = norm(width // heads), norm(width // heads)
        self.qkv, self.out = linear(width, 3 * width), linear(width, width)
        self.gate, self.up, self.down = linear(width, hidden), linear(width, hidden), linear(hidden, width)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """[batch, positions, width] of the residual stream, of the same shape after the layer."""
        B, T, C = x.shape
        qkv = self.qkv(self.attention_norm(x)).split(C, dim=2)
        q, k, v = (y.view(B, T, self.heads, C // self.heads).transpose(1, 2) for y in qkv)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        # Under autocast the norms return float32.
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).contiguous().view(B, T, C))
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """A decoder of `layers` blocks for sequences of at most `length` tokens."""

    def __init__(
        self,
        vocab: int,
        length: int,
        layers: int,
        width: int,
        heads: int,
        hidden: int,
        *,
        theta: float,
        eps: float,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList([Block(width, heads, hidden, eps) for _ in range(layers)])
        self.final_norm = nn.RMSNorm(width, eps=eps)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embedding.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        # cos and sin are made once, for all layers and updates.
        pairs = width // heads // 2
        angles = torch.outer(torch.arange(length), theta ** (-torch.arange(pairs) / pairs))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of `targets` given `tokens`, both int64 [batch, positions], in nats per token."""
        T = tokens.shape[1]
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos[:T], self.sin[:T])
        logits = self.head(self.final_norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))

"""A small byte-level GPT: pre-norm blocks, rotary positions, fused attention.

Text goes in as raw bytes, so there is no tokenizer: the vocabulary is the 256 byte values, and a loss of
`x` nats per token is `x / ln 2` bits per byte of text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int = 256


def rotary_table(block_size: int, head_dim: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of shape (block_size, head_dim / 2): one angle per position and channel pair."""
    frequency = base ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angle = torch.outer(torch.arange(block_size).float(), frequency)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each channel pair of `x` (..., time, head_dim) by the angle of its position."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, time, channels = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3 * self.n_head, -1).transpose(1, 2).chunk(3, dim=1)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(batch, time, channels))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd, bias=False)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.n_embd, bias=False)
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        return x + self.proj(F.gelu(self.fc(self.norm2(x))))


class GPT(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, bias=False)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        cos, sin = rotary_table(config.block_size, config.n_embd // config.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
        if isinstance(module, (Attention, Block)):
            # Every block begins as the identity, so the residual stream keeps its scale at any depth.
            nn.init.zeros_(module.proj.weight)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """The logits of every next token, or, given `targets`, their mean cross-entropy in nats."""
        time = tokens.shape[1]
        cos, sin = self.cos[:time], self.sin[:time]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def generate(self, prompt: bytes, n_bytes: int, temperature: float = 0.8, seed: int = 0) -> bytes:
        """`n_bytes` of text that continue `prompt`, sampled byte by byte."""
        device = self.embedding.weight.device
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same draws on every device
        tokens = torch.tensor([list(prompt)], device=device)
        for _ in range(n_bytes):
            logits = self(tokens[:, -self.config.block_size :])[:, -1]
            probabilities = F.softmax(logits.float() / temperature, dim=-1).cpu()
            chosen = torch.multinomial(probabilities, 1, generator=generator)
            tokens = torch.cat((tokens, chosen.to(device)), dim=1)
        return bytes(tokens[0, len(prompt) :].tolist())

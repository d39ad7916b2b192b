"""The models of the report that no hub has, as ordinary PyTorch."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LSTMLayer(nn.Module):
    """A layer of an encoder, step by step: [N, T, E] -> [N, T, W]."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(inputs, width)

    def forward(self, x_NE: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """One time step."""
        return self.cell(x_NE, state)


class Attention(nn.Module):
    """A decoder step looks at all that the top layer of the encoder has made (Luong et al. 2015, "general")."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.join = nn.Linear(width, width, bias=False), nn.Linear(2 * width, width)

    def forward(self, top_NW: Tensor, memory_NTW: Tensor) -> Tensor:
        """What the step goes on with: [N, W]."""
        scores_NT = (memory_NTW @ self.query(top_NW)[:, :, None])[:, :, 0]
        context_NW = (scores_NT.softmax(dim=1)[:, None] @ memory_NTW)[:, 0]
        return torch.tanh(self.join(torch.cat([top_NW, context_NW], dim=1)))


class Translator(nn.Module):
    """An LSTM encoder and decoder, unrolled over time; the attention of each step feeds the decoder's next one."""

    def __init__(self, vocabulary: int, layers: int, width: int) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(vocabulary, width), nn.Embedding(vocabulary, width)
        self.encoder = nn.ModuleList(LSTMLayer(width, width) for _ in range(layers))
        self.decoder = nn.ModuleList(LSTMLayer((1 + (i == 0)) * width, width) for i in range(layers))
        self.attention = Attention(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, source_NT: Tensor, target_NT: Tensor) -> Tensor:
        """Scores of the target's words: [N, T, vocabulary]."""
        read_TNE = self.source(source_NT).unbind(1)
        states: list[tuple[Tensor, Tensor] | None] = [None] * len(self.encoder)
        tops = []
        for x_NE in read_TNE:
            for i, layer in enumerate(self.encoder):
                states[i] = layer(x_NE, states[i])
                x_NE = states[i][0]  # type: ignore[index]
            tops.append(x_NE)
        memory_NTW = torch.stack(tops, dim=1)
        attended_NW, found = torch.zeros_like(tops[0]), []
        for word_NE in self.target(target_NT).unbind(1):
            x_NE = torch.cat([word_NE, attended_NW], dim=1)
            for i, layer in enumerate(self.decoder):
                states[i] = layer(x_NE, states[i])
                x_NE = states[i][0]  # type: ignore[index]
            attended_NW = self.attention(x_NE, memory_NTW)
            found.append(attended_NW)
        return self.head(torch.stack(found, dim=1))


class Tower(nn.Module):
    """A table, and a perceptron over what it holds."""

    def __init__(self, rows: int, features: int, width: int, embedding: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, embedding)
        sizes = [features * embedding, width, width, width, 256]
        self.layers = nn.Sequential(*(m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())))

    def forward(self, ids_NF: Tensor) -> Tensor:
        """[N, 256]."""
        return self.layers(self.table(ids_NF).flatten(1))


class TwoTowers(nn.Module):
    """Users and items, each with a table of its own; every example's own item against all others of the batch."""

    def __init__(self, users: int, items: int, features: int, width: int, embedding: int) -> None:
        super().__init__()
        self.user = Tower(users, features, width, embedding)
        self.item = Tower(items, features, width, embedding)

    def forward(self, users_NF: Tensor, items_NF: Tensor) -> Tensor:
        """[N, N]."""
        return self.user(users_NF) @ self.item(items_NF).T


class SelfAttention(nn.Module):
    """Causal attention, normalized before, added to what it reads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_NTW: Tensor) -> Tensor:
        """[N, T, W]."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(x_NTW)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x_NTW + self.out(mixed.transpose(1, 2).flatten(2))


class Experts(nn.Module):
    """Experts that each choose the tokens they work at (Zhou et al. 2022, expert choice)."""

    def __init__(self, width: int, experts: int, share: float) -> None:
        super().__init__()
        self.share = share
        self.norm, self.gate = nn.LayerNorm(width), nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(experts)
        )

    def forward(self, x_NTW: Tensor) -> Tensor:
        """[N, T, W]."""
        tokens_MW = self.norm(x_NTW).flatten(0, 1)
        gates_MX = self.gate(tokens_MW).softmax(dim=-1)
        most = math.ceil(self.share * tokens_MW.shape[0] / len(self.experts))
        result_MW = x_NTW.flatten(0, 1)
        for number, expert in enumerate(self.experts):
            weight_C, chosen_C = gates_MX[:, number].topk(most)
            result_MW = result_MW.index_add(0, chosen_C, expert(tokens_MW[chosen_C]) * weight_C[:, None])
        return result_MW.view_as(x_NTW)


class ExpertTransformer(nn.Module):
    """A causal language model whose every layer ends in a mixture of experts."""

    def __init__(self, vocabulary: int, layers: int, width: int, heads: int, experts: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(SelfAttention(width, heads), Experts(width, experts, share=2.0)) for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens_NT: Tensor) -> Tensor:
        """[N, T, vocabulary]."""
        x_NTW = self.token(tokens_NT)
        for block in self.blocks:
            x_NTW = block(x_NTW)
        return self.head(self.norm(x_NTW))


class Perceptron(nn.Module):
    """Wide dense layers."""

    def __init__(self, inputs: int, width: int, layers: int, classes: int) -> None:
        super().__init__()
        sizes = [inputs, *[width] * layers]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.head = nn.Linear(width, classes)

    def forward(self, x_NE: Tensor) -> Tensor:
        """[N, classes]."""
        for layer in self.hidden:
            x_NE = layer(x_NE).relu()
        return self.head(x_NE)

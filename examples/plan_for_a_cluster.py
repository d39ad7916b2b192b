"""Plan the training of a GPT-2 sized model on a cluster that one doesn't have.

No weights are made: the model lives on PyTorch's meta device, and only its step is traced.

Run: python examples/plan_for_a_cluster.py [CLUSTER.toml]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millrace.graph.passes.microbatch import microbatch
from millrace.graph.passes.prune import prune
from millrace.graph.training import training_graph
from millrace.place.chrome_trace import expected_spans, write_trace
from millrace.place.cluster_file import parse_cluster, read_cluster
from millrace.place.placement import place
from millrace.place.summary import describe

TWO_FAST_TWO_SLOW = """
[[device]]
name = "/host:0/gpu:[0-1]"
like = "a100-80"

[[device]]
name = "/host:0/gpu:[2-3]"
like = "t4"

[[link]]
source = "*"
target = "*"
latency_s = 1e-5
bytes_per_s = 1.2e10
"""


class Gpt(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, vocabulary: int, tokens: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Embedding(tokens, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        length = tokens_BT.shape[1]
        x_BTD = self.token(tokens_BT) + self.place.weight[:length]
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return self.head(self.norm(x_BTD))


def main(arguments: list[str], layers: int = 12, width: int = 768) -> None:
    cluster = read_cluster(Path(arguments[0])) if arguments else parse_cluster(TWO_FAST_TWO_SLOW, "two fast, two slow")
    with torch.device("meta"):
        model = Gpt(width, layers, heads=12, vocabulary=50257, tokens=1024)
        tokens = torch.zeros(16, 512, dtype=torch.int64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)

    def loss(model: nn.Module, tokens_BT: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens_BT).flatten(0, 1), tokens_BT.flatten())

    graph = training_graph(model, loss, optimizer, tokens)
    for parts in (1, 4):
        divided = microbatch(graph, parts)
        for search in ("expert", "auto"):
            found = place(prune(divided, ["loss"], divided.updates), cluster, search=search)
            print(f"-- {parts} microbatches, {search}\n{describe(found)}\n")
    write_trace(expected_spans(found), Path("plan.json"), "GPT-2 small, as expected")
    print("plan.json: the timeline of the last one, to be opened at ui.perfetto.dev")


if __name__ == "__main__":
    main(sys.argv[1:])

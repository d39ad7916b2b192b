"""Look into a training step: print its graph, fetch an intermediate, watch tensors in flight, draw it.

Usage: python examples/inspect_graph.py [PICTURE.svg]
"""

import sys
import tempfile
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import millrace
from millrace.graph import draw, summary

torch.manual_seed(0)
model = nn.Sequential(OrderedDict(hidden=nn.Linear(8, 16), relu=nn.ReLU(), output=nn.Linear(16, 3)))
batch = (torch.randn(32, 8), torch.randint(3, (32,)))


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


graph = millrace.training_graph(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), batch)
print(graph)
print()
print(summary(graph))

session = millrace.Session(graph, compile="eager")
print("\nOnly what a fetch needs is run:")
for fetches in (["relu"], ["loss"], ["train", "loss"]):
    print(f"  {' and '.join(fetches):14} {len(session.nodes_for(fetches, batch)):2} of {len(graph.nodes)} nodes")

relu = session.run("relu", batch)
print(f"\nAn intermediate, fetched by its name: relu {list(relu.shape)}, {(relu == 0).float().mean():.0%} zeros")

print("\nTensors in flight, forward and backward, of the module 'hidden':")
with session.watching("hidden", lambda name, t: print(f"  {name:10} {list(t.shape)!s:9} largest {t.abs().max():.4f}")):
    session.run("train", batch)

path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.gettempdir()) / "millrace-step.svg"
draw(graph, path, level="node")
print(f"\nDrawn: {path}")

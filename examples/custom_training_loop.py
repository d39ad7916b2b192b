"""Two networks, two optimizers, one traced step: a generator learns to draw a ring, seen only through its critic.

Usage: python examples/custom_training_loop.py [STEPS]
"""

import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

import millrace

POINTS, NOISE = 256, 8  # per step; numbers that the generator makes a point from


def network(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs))


def ring() -> torch.Tensor:
    """Points [POINTS, 2] close to the circle of radius 1."""
    angle = torch.rand(POINTS) * 2 * math.pi
    radius = 1 + 0.05 * torch.randn(POINTS)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)


def step(v, real):
    """Any Python is allowed here that torch can trace: it runs once, and what it computes becomes the graph."""
    generator, critic = v["generator"], v["critic"]
    drawn = generator(torch.randn(POINTS, NOISE))

    critic_loss = F.softplus(-critic(real)).mean() + F.softplus(critic(drawn.detach())).mean()
    v["critic_optimizer"].zero_grad()
    critic_loss.backward()
    v["critic_optimizer"].step()

    generator_loss = F.softplus(-critic(drawn)).mean()
    v["generator_optimizer"].zero_grad()
    generator_loss.backward()
    v["generator_optimizer"].step()
    return {"drawn": drawn, "critic_loss": critic_loss, "generator_loss": generator_loss}


def picture(points: torch.Tensor, rows: int = 15, cols: int = 31) -> str:
    """How many points lie where, from -1.5 to 1.5 both ways."""
    column, row = (((points / 3 + 0.5).clamp(0, 0.999)) * torch.tensor([cols, rows])).long().T
    counts = torch.zeros(rows, cols, dtype=torch.long).index_put((row, column), torch.tensor(1), accumulate=True)
    return "\n".join("".join(" .:+*#"[min(n, 5)] for n in line) for line in counts.tolist())


torch.manual_seed(0)
generator, critic = network(NOISE, 2), network(2, 1)
variables = {
    "generator": generator,
    "critic": critic,
    "generator_optimizer": torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.9)),
    "critic_optimizer": torch.optim.Adam(critic.parameters(), lr=4e-3, betas=(0.5, 0.9)),
}
graph = millrace.trace(step, variables, ring())
session = millrace.Session(graph)
print(f"one step is a graph of {len(graph.nodes)} nodes with {len(graph.variables)} variables")

for i in range(int(sys.argv[1]) if len(sys.argv) > 1 else 1001):
    _, drawn, critic_loss, generator_loss = session.run(["train", "drawn", "critic_loss", "generator_loss"], ring())
    if i % 200 == 0:
        off = (drawn.norm(dim=1) - 1).abs().mean()
        print(
            f"step {i:4}: critic {critic_loss:.3f}  generator {generator_loss:.3f}  {off:.3f} from the ring on average"
        )

print(picture(session.run("drawn")))  # needs neither the critic nor a batch

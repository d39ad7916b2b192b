"""Logistic regression written by hand: variables, a loss, a gradient step, a session and a loop (TensorFlow's program
of 2015, in today's spelling).

Usage: python examples/logistic_regression.py [STEPS]
"""

import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import millrace

torch.manual_seed(0)
digits = load_digits()  # 1,797 scans of handwritten digits, 8 x 8 pixels each
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
train, test = torch.randperm(len(labels)).split([1437, 360])

variables = {"W": torch.zeros(64, 10, requires_grad=True), "b": torch.zeros(10, requires_grad=True)}


def step(v, batch):
    x, y = batch
    logits = x @ v["W"] + v["b"]
    loss = F.cross_entropy(logits, y)
    dW, db = torch.autograd.grad(loss, [v["W"], v["b"]])
    v["W"] = v["W"] - 0.5 * dW
    v["b"] = v["b"] - 0.5 * db
    return {"logits": logits, "loss": loss}


def next_batch(size=100):
    chosen = train[torch.randint(len(train), (size,))]
    return images[chosen], labels[chosen]


graph = millrace.trace(step, variables, next_batch())
session = millrace.Session(graph, warn_new_shape=False)  # at the end comes a batch of 360

for i in range(int(sys.argv[1]) if len(sys.argv) > 1 else 1000):
    _, loss = session.run(["train", "loss"], next_batch())
    if i % 100 == 0:
        print(f"step {i:4}: loss {loss:.4f}")

# "logits" needs the forward part alone, so nothing is updated by looking.
logits = session.run("logits", (images[test], labels[test]))
print(f"accuracy on {len(test)} scans it never saw: {(logits.argmax(1) == labels[test]).float().mean():.1%}")

"""Learn to write English, character by character: a small causal transformer on the text that Python carries.

Shape suffixes: B windows, L characters, D features, H heads, V characters in the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from millrace.data.text import CharVocabulary, TextBatches, python_text, split_text, text_batches
from millrace.data.text_files import read_text
from millrace.errors import SettingError
from millrace.models.sampling import continued
from millrace.optim.constructors import adamw
from millrace.optim.optimizer import Optimizer
from millrace.optim.schedule import warmup_cosine
from millrace.train.metrics import bits_per_char
from millrace.zoo.base import Facts, Prediction, Task, TaskData
from millrace.zoo.settings import Settings, setting

_HELD_OUT = 0.05  # of the text, for validation, and as much again for the test


@dataclass(frozen=True)
class CharsSettings(Settings):
    """Defaults that write recognizable English after about a minute on two cores."""

    steps: int | None = setting(600, "stop after so many steps", low=1, on_resume=True)
    batch_size: int = setting(16, "windows per step", low=1)
    evaluate_every: int | None = setting(100, "steps between evaluations", low=1, on_resume=True)
    checkpoint_every: int | None = setting(100, "steps between checkpoints", low=1, on_resume=True)
    # The other core is the compiler's at first. Measured on two busy cores, a second thread made a step take several
    # times as long, since both wait for each other at every operator; threads=none is worth a try on idle ones.
    threads: int | None = setting(1, "of the CPU to train with; none takes one per core", low=1, on_resume=True)
    text: str = setting("", "a file to learn from instead of the reference that Python's help() shows")
    length: int = setting(128, "characters that the model sees at a time", low=2)
    layers: int = setting(4, "of the transformer", low=1)
    width: int = setting(128, "features per character", low=1)
    heads: int = setting(4, "of attention per layer; they must divide the width", low=1)
    dropout: float = setting(0.0, "share left out after every sublayer", low=0, high=0.9)
    learning_rate: float = setting(3e-3, "at the top of the schedule", low=0)
    weight_decay: float = setting(0.1, "decoupled", low=0)
    prompt: str = setting("The ", "what the sample at the end begins with", on_resume=True)
    sample: int = setting(300, "characters to write, at the end and in predictions", low=1, on_resume=True)
    temperature: float = setting(0.7, "of sampling: 0 always takes the likeliest", low=0, on_resume=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise SettingError(f"heads={self.heads} must divide width={self.width}: set one of them, such as heads=4.")


class Chars(Task[CharsSettings]):
    """Batches {"inputs", "targets"}, both [B, L]; a target is the character after its input. Logits [B, L, V]."""

    settings_type = CharsSettings
    metric = "bits_per_char"
    better = "min"

    def data(self, facts: Facts | None = None) -> TaskData:
        """A stream of windows of the text's beginning; its end is held out."""
        text = read_text(Path(self.settings.text)) if self.settings.text else python_text()
        vocabulary = CharVocabulary.of(text) if facts is None else _vocabulary(facts)
        rest, test = split_text(text, _HELD_OUT)
        train, validation = split_text(rest, _HELD_OUT)
        return TaskData(
            text_batches(vocabulary.encode(train), self.settings.batch_size, self.settings.length, self.settings.seed),
            self._held_out(vocabulary.encode(validation)),
            self._held_out(vocabulary.encode(test)),
            facts={"vocabulary": vocabulary.to_json()},
        )

    def _held_out(self, tokens: Tensor) -> TextBatches:
        """In batches of one size, so that one graph serves all: a rest of less than a batch is left out."""
        length = self.settings.length
        windows = max(1, len(tokens) // length - 1)
        size = min(self.settings.batch_size, windows)
        return text_batches(tokens[: len(tokens) - windows % size * length], size, length)

    def model(self, facts: Facts) -> nn.Module:
        """As wide and deep as the settings say."""
        s = self.settings
        return Transformer(len(_vocabulary(facts)), s.length, s.layers, s.width, s.heads, s.dropout)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the next character."""
        logits_BLV = model(batch["inputs"])
        loss = functional.cross_entropy(logits_BLV.flatten(0, 1), batch["targets"].flatten())
        return loss, {"bits_per_char": bits_per_char(loss)}

    def optimizer(self, model: nn.Module, steps: int) -> Optimizer:
        """AdamW on clipped gradients; the rate climbs shortly and falls along a cosine."""
        s = self.settings
        rate = warmup_cosine(s.learning_rate, steps, warmup=steps // 10, end=s.learning_rate / 20)
        return adamw(rate, betas=(0.9, 0.98), weight_decay=s.weight_decay, clip_norm=1.0)

    def report(self, model: nn.Module, data: TaskData) -> str:
        """A text that the model writes."""
        prompt, _ = _known(self.settings.prompt, _vocabulary(data.facts))
        written = self._continued(model, prompt, _vocabulary(data.facts))
        return f"what it writes:\n\n{_indented(prompt + written)}\n"

    def predict(self, model: nn.Module, file: Path, facts: Facts) -> Prediction:
        """How the text in a file might go on."""
        vocabulary = _vocabulary(facts)
        prompt, unknown = _known(read_text(file), vocabulary)
        written = self._continued(model, prompt, vocabulary)
        note = f" (left out {unknown!r}, which the model never saw)" if unknown else ""
        shown = prompt[-self.settings.length :] + written
        return Prediction(f"goes on{note}:\n\n{_indented(shown)}\n", {"continuation": written, "left_out": unknown})

    def _continued(self, model: nn.Module, prompt: str, vocabulary: CharVocabulary) -> str:
        """`sample` characters more, the same every time."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        tokens = vocabulary.encode(prompt or vocabulary.characters[0])
        window, temperature = self.settings.length, self.settings.temperature
        return vocabulary.decode(continued(model, tokens, self.settings.sample, window, temperature, generator))


class Transformer(nn.Module):
    """A decoder-only transformer with normalization before each sublayer, which trains fast from the first step.

    Source: Radford et al., "Language models are unsupervised multitask learners", 2019.
    """

    def __init__(self, vocabulary: int, length: int, layers: int, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.character = nn.Embedding(vocabulary, width)
        self.place = nn.Embedding(length, width)
        self.layers = nn.Sequential(*(Layer(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.readout = nn.Linear(width, vocabulary)
        for embedding in (self.character, self.place):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Logits [B, L, V] of the next character at every place."""
        x_BLD = self.character(tokens_BL) + self.place.weight[: tokens_BL.shape[1]]
        return cast(Tensor, self.readout(self.norm(self.layers(x_BLD))))


class Layer(nn.Module):
    """Attention to what came before, then a transformation of every place by itself; both start as nothing."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)
        for last in (self.attention_out, self.mlp_out):
            nn.init.zeros_(last.weight)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] to the same."""
        batch, length, width = x_BLD.shape
        parts = self.query_key_value(self.attention_norm(x_BLD)).chunk(3, dim=-1)
        q_BHLK, k_BHLK, v_BHLK = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in parts)
        seen_BHLK = functional.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, is_causal=True)
        seen_BLD = seen_BHLK.transpose(1, 2).reshape(batch, length, width)
        x_BLD = x_BLD + self.dropout(self.attention_out(seen_BLD))
        hidden = functional.gelu(self.mlp_in(self.mlp_norm(x_BLD)), approximate="tanh")
        return x_BLD + cast(Tensor, self.dropout(self.mlp_out(hidden)))


def _vocabulary(facts: Facts) -> CharVocabulary:
    return CharVocabulary.from_json(cast(Facts, facts["vocabulary"]))


def _known(text: str, vocabulary: CharVocabulary) -> tuple[str, str]:
    """The text without characters that are not in the vocabulary, and these."""
    unknown = set(text) - set(vocabulary.characters)
    return "".join(c for c in text if c not in unknown), "".join(sorted(unknown))


def _indented(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())


TASK = Chars

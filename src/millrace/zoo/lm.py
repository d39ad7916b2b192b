"""Predict English byte by byte: an LSTM whose state goes on from window to window, against compressors and a 5-gram.

Source: Mikolov et al., "Recurrent neural network based language model", 2010.
Shape suffixes: B streams, L bytes of a window, V byte values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from millrace.data.batches import Batches
from millrace.data.blocks import blocks
from millrace.data.corpus import corpus
from millrace.data.streams import StreamBatches, stream_batches
from millrace.errors import DataError, SettingError
from millrace.models.byte_lstm import ByteLstm, log2_probabilities
from millrace.models.sampling import Sampling
from millrace.models.text_baselines import Said, baselines
from millrace.optim.constructors import adamw
from millrace.optim.optimizer import Optimizer
from millrace.optim.schedule import warmup_cosine
from millrace.zoo.base import Facts, Prediction, Task, TaskData
from millrace.zoo.settings import Settings, setting

_EVALUATED = (8, 256)  # streams and bytes of a window, of what is held out
_VALIDATED_LENGTH = 2048  # bytes of a window that begins without state, so that its beginning counts for little


@dataclass(frozen=True)
class LmSettings(Settings):
    """Defaults that take about five minutes of one core."""

    steps: int | None = setting(1200, "stop after so many steps", low=1, on_resume=True)
    batch_size: int = setting(16, "streams that are read side by side", low=1)
    evaluate_every: int | None = setting(200, "steps between evaluations", low=1, on_resume=True)
    checkpoint_every: int | None = setting(200, "steps between checkpoints", low=1, on_resume=True)
    threads: int | None = setting(1, "of the CPU to train with; none takes one per core", low=1, on_resume=True)
    data: str = setting("", "a text, a directory of texts or a Hugging Face data set; else the English in Python")
    length: int = setting(128, "bytes of a window, through which gradients flow; the state goes on to the next", low=2)
    carry: bool = setting(True, "begin a window with the state at the end of the one before")
    layers: int = setting(1, "of the LSTM", low=1)
    width: int = setting(384, "units of a layer", low=1)
    ngrams: str = setting("2,3,4,6", "lengths of the sequences of bytes that have an embedding; none: empty")
    rows: int = setting(65536, "of each table of sequences", low=1)
    embedding: int = setting(32, "features of a byte, and of a sequence", low=1)
    dropout: float = setting(0.0, "share of features left out before and after the LSTM", low=0, high=0.9)
    learning_rate: float = setting(4e-3, "at the top of the schedule", low=0)
    prompt: str = setting("The ", "what the sample at the end begins with", on_resume=True)
    sample: int = setting(400, "bytes to write, at the end and in predictions", low=1, on_resume=True)
    temperature: float = setting(0.7, "of sampling: 0 always takes the likeliest", low=0, on_resume=True)
    top_k: int = setting(0, "draw from so many of the likeliest; 0 from all", low=0, on_resume=True)
    top_p: float = setting(0.95, "draw from the likeliest that together have this probability", low=0, on_resume=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            orders = self.orders
        except ValueError:
            orders = [0]
        if orders and min(orders) < 1:
            raise SettingError(f"The setting ngrams takes lengths such as 2,3,4, but got {self.ngrams!r}.")
        Sampling(self.temperature, self.top_k, self.top_p)

    @property
    def orders(self) -> list[int]:
        """The lengths in `ngrams`."""
        return [int(word) for word in self.ngrams.split(",") if word]


class Lm(Task[LmSettings]):
    """Batches of `stream_batches`; logits [B, L, 256]."""

    settings_type = LmSettings
    metric = "bits_per_byte"
    better = "min"
    bar = 2.0

    def data(self, facts: Facts | None = None) -> TaskData:
        """Streams of blocks of the text; a paragraph is in one part only, and in the text once."""
        s = self.settings
        train, validation, test = blocks(corpus(s.data))
        before = max(s.orders, default=1) - 1
        return TaskData(
            stream_batches(train, s.batch_size, s.length, before, s.seed),
            _held_out(validation, 4, _VALIDATED_LENGTH, before),
            _held_out(test, *_EVALUATED, before),
        )

    def model(self, facts: Facts) -> nn.Module:
        """As wide and deep as the settings say."""
        s = self.settings
        return ByteLstm(
            s.batch_size,
            width=s.width,
            layers=s.layers,
            embedding=s.embedding,
            orders=s.orders,
            rows=s.rows,
            dropout=s.dropout,
        )

    def loss(self, model: ByteLstm, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the next byte. In evaluation every window begins without state."""
        streams = (batch["stream"], batch["fresh"]) if model.training and self.settings.carry else None
        logits_BLV = model(batch["inputs"], streams)
        loss = functional.cross_entropy(logits_BLV.flatten(0, 1), batch["targets"].flatten())
        return loss, {"bits_per_byte": loss / math.log(2)}

    def optimizer(self, model: nn.Module, steps: int) -> Optimizer:
        """Adam on clipped gradients; the rate climbs shortly and falls along a cosine."""
        top = self.settings.learning_rate
        rate = warmup_cosine(top, steps, warmup=steps // 20, end=top / 50)
        return adamw(rate, betas=(0.9, 0.99), weight_decay=0.0, clip_norm=1.0)

    def evaluate(self, model: nn.Module, batches: Batches) -> dict[str, float]:
        """With the state carried through all of the text, as in training."""
        bits = float(-log2_probabilities(cast(ByteLstm, model), batches, carry=self.settings.carry).mean())
        return {"loss": bits * math.log(2), "bits_per_byte": bits}

    def report(self, model: nn.Module, data: TaskData) -> str:
        """Bits per byte of the test text, of what the model is measured against, and a text that it writes."""
        train, validation, test = (cast(StreamBatches, part) for part in (data.train, data.validation, data.test))
        lines = self.compared(cast(ByteLstm, model), train, validation, test)
        table = "\n".join(f"  {bits:6.3f}  {name}" for name, bits in lines.items())
        written = self._continued(cast(ByteLstm, model), self.settings.prompt.encode())
        said = _indented(self.settings.prompt + written)
        return f"bits per byte of {len(test.tokens)} bytes of test text:\n{table}\n\nwhat it writes:\n\n{said}\n"

    def compared(
        self, model: ByteLstm, train: StreamBatches, validation: StreamBatches, test: StreamBatches
    ) -> dict[str, float]:
        """Bits per byte of the test text, by who says how likely it is."""
        said, known = (Said(part, log2_probabilities(model, part)) for part in (test, validation))
        forgotten = log2_probabilities(model, _cut(test, self.settings.length), carry=False)
        return {
            "this model": float(-said.log2.mean()),
            f"with its state forgotten every {self.settings.length} bytes": float(-forgotten.mean()),
            **baselines(train, known, said),
        }

    def predict(self, model: nn.Module, file: Path, facts: Facts) -> Prediction:
        """How the text in a file might go on."""
        try:
            content = file.read_bytes()
        except OSError as error:
            raise DataError(f"The file {file} cannot be read: {error.strerror}. Give a file of text.") from error
        written = self._continued(cast(ByteLstm, model), content)
        shown = content[-200:].decode("utf-8", errors="replace") + written
        return Prediction(f"goes on:\n\n{_indented(shown)}\n", {"continuation": written})

    def _continued(self, model: ByteLstm, content: bytes) -> str:
        """`sample` bytes more, the same every time."""
        s = self.settings
        sampling, generator = Sampling(s.temperature, s.top_k, s.top_p), torch.Generator().manual_seed(s.seed)
        return bytes(model.written(content or b"\n", s.sample, sampling, generator)).decode("utf-8", errors="replace")


def _held_out(tokens: Tensor, streams: int, length: int, before: int) -> StreamBatches:
    """Windows of a text that is not trained on: shorter ones if it is short, so that most of it is read."""
    length = max(1, min(length, len(tokens) // streams - 1))
    return stream_batches(tokens, streams, length, before)


def _cut(batches: StreamBatches, length: int) -> StreamBatches:
    return stream_batches(batches.tokens, batches.streams, length, batches.before)


def _indented(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())


TASK = Lm

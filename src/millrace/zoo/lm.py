"""Predict English byte by byte: an LSTM whose state goes on from window to window, against compressors and a 5-gram.

Shape suffixes: B streams, L bytes of a window, K bytes before it, D numbers of state, V byte values.
Sources: Mikolov et al., "Recurrent neural network based language model", 2010, and "Strategies for training large scale
neural network language models", 2011 (n-grams that lead to the output directly).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from millrace.data.batches import Batches
from millrace.data.blocks import blocks
from millrace.data.compression import COMPRESSORS, bits_per_byte
from millrace.data.corpus import corpus
from millrace.data.streams import StreamBatches, stream_batches
from millrace.errors import DataError, SettingError
from millrace.models.carried import CarriedState
from millrace.models.ngram import KneserNey
from millrace.models.ngram_embedding import NgramEmbedding
from millrace.models.sampling import Sampling
from millrace.optim.constructors import adamw
from millrace.optim.optimizer import Optimizer
from millrace.optim.schedule import Cosine, Warmup
from millrace.zoo.base import Facts, Prediction, Task, TaskData
from millrace.zoo.settings import Settings, setting

BYTES = 256
_EVALUATED = (8, 256)  # streams and bytes of a window, of what is held out
_SHARES = [part / 20 for part in range(21)]  # of the model beside the 5-gram
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
        return ByteLstm(self.settings)

    def loss(self, model: ByteLstm, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the next byte. In evaluation every window begins without state."""
        streams = (batch["stream"], batch["fresh"]) if model.training and self.settings.carry else None
        logits_BLV = model(batch["inputs"], streams)
        loss = functional.cross_entropy(logits_BLV.flatten(0, 1), batch["targets"].flatten())
        return loss, {"bits_per_byte": loss / math.log(2)}

    def optimizer(self, model: nn.Module, steps: int) -> Optimizer:
        """Adam on clipped gradients; the rate climbs shortly and falls along a cosine."""
        top, climb = self.settings.learning_rate, max(1, steps // 20)
        rate = Warmup(climb, Cosine(top, steps=max(1, steps - climb), end=top / 50))
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
        grams = KneserNey(train.tokens.numpy(), order=5, vocabulary=BYTES)
        (learned, counted), held_out = (
            (log2_probabilities(model, part), _counted(grams, part)) for part in (test, validation)
        )
        share = min(_SHARES, key=lambda share: _mixed(*held_out, share))
        forgotten = log2_probabilities(model, _cut(test, self.settings.length), carry=False)
        found = {
            "this model": float(-learned.mean()),
            f"with its state forgotten every {self.settings.length} bytes": float(-forgotten.mean()),
            "5-gram, interpolated Kneser-Ney": float(-counted.mean()),
            f"{share:.0%} of this model and {1 - share:.0%} of the 5-gram": _mixed(learned, counted, share),
        }
        content, after = (part.tokens.numpy().astype(np.uint8).tobytes() for part in (test, train))
        for name, compress in COMPRESSORS.items():
            found[f"{name}, which read the training text before"] = bits_per_byte(compress, content, after)
            found[f"{name}, of the test text alone"] = bits_per_byte(compress, content)
        return found

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


class ByteLstm(nn.Module):
    """Bytes and the sequences that end with them, through an LSTM, and past it, to what comes next."""

    def __init__(self, s: LmSettings) -> None:
        super().__init__()
        self.byte = nn.Embedding(BYTES, s.embedding)
        nn.init.normal_(self.byte.weight, std=0.1)
        self.ngrams = NgramEmbedding(s.orders, s.rows, s.embedding) if s.orders else None
        features = s.embedding * (1 + len(s.orders))
        self.dropout = nn.Dropout(s.dropout)
        self.lstm = nn.LSTM(features, s.width, s.layers, batch_first=True)
        self.readout = nn.Linear(s.width, BYTES)
        self.past = nn.Linear(features, BYTES, bias=False)
        self.carried = CarriedState(s.batch_size, 2 * s.layers * s.width)

    @property
    def before(self) -> int:
        """K: how many bytes before a window it looks at."""
        return self.ngrams.before if self.ngrams else 0

    def forward(self, inputs_BKL: Tensor, streams: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Logits [B, L, V] of the byte after each but the first K. `streams`: the numbers of those that the rows go on
        with, and whether they begin [B]; without, nothing is carried."""
        if streams is None:
            return self.after(inputs_BKL)[0]
        logits_BLV, state_BD = self.after(inputs_BKL, self.carried.read(*streams))
        self.carried.write(streams[0], state_BD)
        return logits_BLV

    def after(self, inputs_BKL: Tensor, state_BD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits, and the state after the last byte; with a state of None it begins anew."""
        x_BLE = self.byte(inputs_BKL[:, self.before :])
        if self.ngrams is not None:
            x_BLE = torch.cat([x_BLE, self.ngrams(inputs_BKL)], dim=-1)
        x_BLE = self.dropout(x_BLE)
        y_BLH, state_BD = self._recurrent(x_BLE, state_BD)
        return self.readout(self.dropout(y_BLH)) + self.past(x_BLE), state_BD

    def _recurrent(self, x_BLE: Tensor, state_BD: Tensor | None) -> tuple[Tensor, Tensor]:
        batch, layers, width = len(x_BLE), self.lstm.num_layers, self.lstm.hidden_size
        if state_BD is None:
            state_BD = x_BLE.new_zeros(batch, 2 * layers * width)
        h_NBH, c_NBH = state_BD.to(x_BLE.dtype).view(batch, 2, layers, width).permute(1, 2, 0, 3).contiguous()
        y_BLH, (h_NBH, c_NBH) = self.lstm(x_BLE, (h_NBH, c_NBH))
        return y_BLH, torch.stack([h_NBH, c_NBH]).permute(2, 0, 1, 3).reshape(batch, -1)

    @torch.no_grad()
    def written(self, content: bytes, count: int, sampling: Sampling, generator: torch.Generator) -> list[int]:
        """Bytes that it draws one after the other, after some that are given."""
        device = self.byte.weight.device
        text = [0] * self.before + list(content)
        begin, state_BD = 0, None
        for _ in range(count):
            logits_BLV, state_BD = self.after(torch.tensor([text[begin:]], device=device), state_BD)
            begin = len(text) - self.before
            text.append(int(sampling.draw(logits_BLV[:, -1].float().cpu(), generator)))
        return text[-count:]


@torch.no_grad()
def log2_probabilities(model: ByteLstm, batches: Batches, *, carry: bool = True) -> Tensor:
    """Of every target of a pass, [streams, bytes]. carry: begin a window with the state at the last one's end."""
    device = model.byte.weight.device
    state_BD: Tensor | None = None
    found = []
    for batch in batches.one_pass():
        begins = not carry or bool(batch["fresh"].all())
        logits_BLV, state_BD = model.after(batch["inputs"].to(device), None if begins else state_BD)
        log_BLV = logits_BLV.float().log_softmax(-1) / math.log(2)
        found.append(log_BLV.gather(-1, batch["targets"].to(device)[..., None])[..., 0].cpu().double())
    return torch.cat(found, dim=1)


def _held_out(tokens: Tensor, streams: int, length: int, before: int) -> StreamBatches:
    """Windows of a text that is not trained on: shorter ones if it is short, so that most of it is read."""
    length = max(1, min(length, len(tokens) // streams - 1))
    return stream_batches(tokens, streams, length, before)


def _cut(batches: StreamBatches, length: int) -> StreamBatches:
    return stream_batches(batches.tokens, batches.streams, length, batches.before)


def _counted(model: KneserNey, batches: StreamBatches) -> Tensor:
    """What counting says of the same targets as `log2_probabilities`."""
    return batches.of_targets(torch.from_numpy(model.probabilities(batches.tokens.numpy()))).log2()


def _mixed(learned: Tensor, counted: Tensor, share: float) -> float:
    """Bits per byte of what two models say together, one with this share, the other with the rest."""
    return float(-(share * learned.exp2() + (1 - share) * counted.exp2()).log2().mean())


def _indented(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())


TASK = Lm

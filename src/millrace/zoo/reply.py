"""Offer three different short replies to a message, if it deserves one: a quick trigger before a search among replies.

Source: Kannan et al., "Smart Reply: automated response suggestion for email", KDD 2016.
Shape suffixes: B messages, S subwords of a message, T of a reply, D features, V subwords in the vocabulary.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from millrace.data.batches import Batches
from millrace.data.exchanges import Exchange, plain, read_exchanges
from millrace.data.sources import as_batches
from millrace.data.subwords import END, PAD, START, Subwords
from millrace.errors import DataError
from millrace.models.beam import Beam
from millrace.models.encoder_decoder import search, shifted
from millrace.models.lstm_encoder_decoder import LstmEncoderDecoder
from millrace.models.ngram_embedding import NgramEmbedding
from millrace.models.trie import Trie
from millrace.optim.constructors import adamw
from millrace.optim.optimizer import Optimizer
from millrace.optim.schedule import Cosine, Warmup
from millrace.zoo.base import Facts, Prediction, Task, TaskData
from millrace.zoo.settings import Settings, setting

_OFFERED = 3
_SEARCHED = 100  # messages whose replies are searched for at a time
_TIMED = 20  # messages, one at a time


@dataclass(frozen=True)
class ReplySettings(Settings):
    """Defaults that learn the made-up language in about two minutes of one core."""

    steps: int | None = setting(400, "stop after so many steps", low=1, on_resume=True)
    batch_size: int = setting(64, "messages per step", low=1)
    evaluate_every: int | None = setting(100, "steps between evaluations", low=1, on_resume=True)
    checkpoint_every: int | None = setting(100, "steps between checkpoints", low=1, on_resume=True)
    threads: int | None = setting(1, "of the CPU to train with; none takes one per core", low=1, on_resume=True)
    data: str = setting("", "exchanges: .tsv, .jsonl or a Hugging Face data set; else made-up ones")
    made_up: int = setting(6000, "messages of the made-up exchanges", low=1000)
    pieces: int = setting(1200, "subwords at most, in the vocabulary", low=300)
    longest: int = setting(32, "subwords of a message that are read: its first ones", low=2)
    longest_reply: int = setting(12, "subwords of a reply that is still a short one", low=2)
    replies: int = setting(300, "of the training data's replies, the most frequent, may be offered", low=_OFFERED)
    width: int = setting(64, "features of every layer; even", low=2)
    layers: int = setting(2, "of the encoder, and of the decoder", low=2)
    dropout: float = setting(0.2, "share left out before every layer", low=0, high=0.9)
    learning_rate: float = setting(4e-3, "at the top of the schedule", low=0)
    threshold: float = setting(0.5, "probability from which on replies are offered", low=0, high=1, on_resume=True)
    beam: int = setting(12, "hypotheses of the search", low=_OFFERED, on_resume=True)


class Offer(NamedTuple):
    """A reply that is offered. Replies of one cluster mean the same."""

    reply: str
    cluster: str
    log_prob: float


class Reply(Task[ReplySettings]):
    """Batches {"message": [B, S], "reply": [B, T], "answered": [B] float}; without a short reply, "reply" is PAD."""

    settings_type = ReplySettings
    metric = "top3"
    monitor = "loss"  # the metric takes a search
    bar = 0.7
    _subwords: Subwords
    _clusters: dict[str, str]  # of every reply that may be offered
    _test: list[Exchange]

    def data(self, facts: Facts | None = None) -> TaskData:
        """Exchanges in parts that share no message; vocabulary and replies are those of the first part."""
        s = self.settings
        parts = read_exchanges(s.data, s.made_up, s.seed)
        if facts is None:
            texts = [text for exchange in parts.train for text in (exchange.message, exchange.reply)]
            self._subwords = Subwords.of(texts, s.pieces)
            counted = Counter(e.reply for e in parts.train if self._is_short(e.reply))
            offered = [reply for reply, _ in counted.most_common(s.replies)]
            clusters = {exchange.reply: exchange.cluster for exchange in parts.train}
            facts = {"subwords": self._subwords.to_json(), "replies": {reply: clusters[reply] for reply in offered}}
        self._recall(facts)
        if len(set(self._clusters.values())) < _OFFERED:
            raise DataError(f"There are too few different replies to offer {_OFFERED}. Give exchanges with more.")
        self._test = parts.test
        return TaskData(
            as_batches(self._tensors(parts.train), batch_size=s.batch_size, seed=s.seed, drop_last=True),
            as_batches(self._tensors(parts.validation), batch_size=len(parts.validation), shuffle=False),
            as_batches(self._tensors(parts.test), batch_size=_SEARCHED, shuffle=False, drop_last=False),
            facts=facts,
        )

    def _recall(self, facts: Facts) -> None:
        self._subwords = Subwords.from_json(cast(Facts, facts["subwords"]))
        self._clusters = cast("dict[str, str]", facts["replies"])

    def _is_short(self, reply: str) -> bool:
        return bool(reply) and len(self._subwords.encode(reply)) < self.settings.longest_reply

    def _tensors(self, exchanges: Sequence[Exchange]) -> dict[str, Tensor]:
        s = self.settings
        messages = [self._subwords.encode(exchange.message) for exchange in exchanges]
        replies = [[*self._subwords.encode(e.reply), END] if self._is_short(e.reply) else [] for e in exchanges]
        return {
            "message": _padded(messages, s.longest),
            "reply": _padded(replies, s.longest_reply),
            "answered": torch.tensor([float(bool(reply)) for reply in replies]),
        }

    def model(self, facts: Facts) -> nn.Module:
        """The trigger, and what writes."""
        self._recall(facts)
        return ReplyModel(len(self._subwords), self.settings)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Of whether a reply was due, and of the subwords of replies: means over messages."""
        due_B, logits_BTV = model(batch["message"], shifted(batch["reply"], START))
        trigger = functional.binary_cross_entropy_with_logits(due_B, batch["answered"])
        target_BT = batch["reply"]
        each_BT = functional.cross_entropy(
            logits_BTV.flatten(0, 1), target_BT.flatten(), ignore_index=PAD, reduction="none"
        ).view_as(target_BT)
        written_B = each_BT.sum(1) / (target_BT != PAD).sum(1).clamp(min=1)
        right_B = (due_B > 0) == (batch["answered"] > 0.5)
        return trigger + written_B.mean(), {"trigger_accuracy": right_B.float().mean(), "trigger_loss": trigger}

    def optimizer(self, model: nn.Module, steps: int) -> Optimizer:
        """AdamW on clipped gradients; the rate climbs over a tenth of the run and falls along a cosine."""
        s = self.settings
        climb = max(1, steps // 10)
        rate = Warmup(climb, Cosine(s.learning_rate, steps=max(1, steps - climb), end=s.learning_rate / 20))
        return adamw(rate, betas=(0.9, 0.98), weight_decay=0.05, clip_norm=1.0)

    def evaluate(self, model: nn.Module, batches: Batches) -> dict[str, float]:
        """The trigger's precision and recall; how often one of three offers means what the reply was, and the first."""
        found = [(batch, self._due(model, batch["message"])) for batch in batches.one_pass()]
        due, answered = torch.cat([due for _, due in found]), torch.cat([batch["answered"] for batch, _ in found]) > 0.5
        hits = [hit for batch, _ in found for hit in self._hits(model, batch)]
        return {
            **super().evaluate(model, batches),
            "precision": float((due & answered).sum() / due.sum().clamp(min=1)),
            "recall": float((due & answered).sum() / answered.sum()),
            "top3": sum(place < _OFFERED for place in hits) / len(hits),
            "top1": sum(place == 0 for place in hits) / len(hits),
        }

    def _due(self, model: nn.Module, message_BS: Tensor) -> Tensor:
        """For which messages replies are offered, bool [B]."""
        with torch.no_grad():
            due_B = cast(ReplyModel, model).trigger(message_BS.to(next(model.parameters()).device))
        return (due_B.sigmoid() >= self.settings.threshold).cpu()

    def _hits(self, model: nn.Module, batch: dict[str, Tensor]) -> list[int]:
        """Of the messages that got a reply: the place of the offer that means the same; 3 where there is none."""
        rows = batch["answered"] > 0.5
        said = [self._subwords.decode(row) for row in batch["reply"][rows].tolist()]
        places = []
        for reply, offers in zip(said, self.offers(model, batch["message"][rows]) if said else [], strict=True):
            clusters = [offer.cluster for offer in offers]
            wanted = self._clusters.get(reply, plain(reply))
            places.append(clusters.index(wanted) if wanted in clusters else _OFFERED)
        return places

    def offers(self, model: nn.Module, message_BS: Tensor) -> list[list[Offer]]:
        """Three replies to each message, of three clusters, the likeliest first."""
        found = self._searched(model, message_BS, set())
        for row, offers in enumerate(found):
            while len(offers) < _OFFERED:  # the beam was full of replies that mean the same
                more = self._searched(model, message_BS[row : row + 1], {offer.cluster for offer in offers})
                offers += more[0][: _OFFERED - len(offers)]
        return found

    def _searched(self, model: nn.Module, message_BS: Tensor, but: set[str]) -> list[list[Offer]]:
        """The best reply of each of the best clusters that the beam sees, at most three, leaving some clusters out."""
        s = self.settings
        trie = Trie((self._subwords.encode(r) for r, cluster in self._clusters.items() if cluster not in but), END)
        beam = Beam(START, END, s.beam, s.longest_reply, length_penalty=0.0)
        found = []
        for hypotheses in search(cast(ReplyModel, model).writer, message_BS, beam, trie.next_tokens):
            best: dict[str, Offer] = {}
            for hypothesis in hypotheses:
                reply = self._subwords.decode(hypothesis.tokens)
                cluster = self._clusters[reply]
                best.setdefault(cluster, Offer(reply, cluster, hypothesis.log_prob))
            found.append(list(best.values())[:_OFFERED])
        return found

    def report(self, model: nn.Module, data: TaskData) -> str:
        """Hits by wording and of always offering the same, what the trigger saves, and some offers."""
        held_out = [exchange for exchange in self._test if exchange.wording == "held out"]
        known = [exchange for exchange in self._test if exchange.wording != "held out"]
        lines = ["one of three offers means what the reply was:"]
        for name, part in (("messages in wordings that were trained on", known), ("… that were not", held_out)):
            hits = self._hits(model, self._tensors(part)) if any(self._is_short(e.reply) for e in part) else []
            lines += [f"  {sum(h < _OFFERED for h in hits) / len(hits):6.1%}  {name} ({len(hits)})"] if hits else []
        frequent, share = self._always_the_same(data)
        lines += [
            f"  {share:6.1%}  always offering the three most frequent: {', '.join(frequent)}",
            "",
            self._saved(model),
        ]
        for message in self.examples(8):
            lines += ["", f"  {message}", f"  → {_shown(self.said(model, message))}"]
        return "\n".join(lines)

    def _always_the_same(self, data: TaskData) -> tuple[list[str], float]:
        """The most frequent clusters, and how often the reply is one of them."""
        replied = [e.cluster for e in self._test if self._is_short(e.reply)]
        trained = (reply for batch in data.train.one_pass() for reply in batch["reply"].tolist() if any(reply))
        counted = Counter(self._clusters.get(self._subwords.decode(reply), "") for reply in trained)
        frequent = [cluster for cluster, _ in counted.most_common(_OFFERED)]
        return frequent, sum(cluster in frequent for cluster in replied) / len(replied)

    def _saved(self, model: nn.Module) -> str:
        """What the trigger costs and saves, a message at a time."""
        message_BS = self._tensors(self._test[:_TIMED])["message"]
        rows = [message_BS[row : row + 1] for row in range(len(message_BS))]
        quick_s, slow_s = (
            _seconds(work, rows) for work in (lambda m: self._due(model, m), lambda m: self.offers(model, m))
        )
        passed = float(self._due(model, self._tensors(self._test)["message"]).float().mean())
        saved = 1 - (quick_s + passed * slow_s) / slow_s
        return (
            f"the trigger takes {1e3 * quick_s:.2f} ms a message and lets {passed:.0%} pass to the search, which takes "
            f"{1e3 * slow_s:.1f} ms: {saved:.0%} of the time is saved"
        )

    def examples(self, count: int) -> list[str]:
        """Some messages of the test, from all over it, once there is `data`."""
        return [exchange.message for exchange in self._test[:: max(1, len(self._test) // count)][:count]]

    def said(self, model: nn.Module, message: str) -> list[str]:
        """Three replies to a message; none where no short reply is due."""
        message_1S = self._tensors([Exchange(message, "", "")])["message"]
        is_due = bool(self._due(model, message_1S)[0])
        return [offer.reply for offer in self.offers(model, message_1S)[0]] if is_due else []

    def predict(self, model: nn.Module, file: Path, facts: Facts) -> Prediction:
        """Three replies to the message in a file, or none."""
        self._recall(facts)
        try:
            message = " ".join(file.read_text(encoding="utf-8").split())
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"The message {file} cannot be read: {error}. Give a file of plain text.") from error
        if not message:
            raise DataError(f"The message {file} is empty. Give a file of plain text.")
        replies = self.said(model, message)
        return Prediction(_shown(replies), {"replies": list(replies)})


class ReplyModel(nn.Module):
    """Two models that are trained at once and share nothing: the quick one decides whether the other is asked."""

    def __init__(self, vocabulary: int, s: ReplySettings) -> None:
        super().__init__()
        self.trigger = Trigger(vocabulary, s.width, s.dropout)
        self.writer = LstmEncoderDecoder(vocabulary, vocabulary, s.width, s.layers, s.dropout)

    def forward(self, message_BS: Tensor, previous_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of whether a reply is due [B], and of its subwords [B, T, V]."""
        return self.trigger(message_BS), self.writer(message_BS, previous_BT)


class Trigger(nn.Module):
    """A feed-forward network on the mean of the embeddings of a message's subwords, and of pairs of them."""

    def __init__(self, vocabulary: int, width: int, dropout: float) -> None:
        super().__init__()
        self.one = nn.Embedding(vocabulary, width)
        self.two = NgramEmbedding([2], rows=4096, width=width)
        self.layers = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(2 * width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 1)
        )

    def forward(self, message_BS: Tensor) -> Tensor:
        """Logits [B]."""
        seen_BS1 = (message_BS != PAD)[..., None]
        x_BSD = torch.cat([self.one(message_BS), self.two(functional.pad(message_BS, (1, 0), value=START))], dim=-1)
        mean_BD = (x_BSD * seen_BS1).sum(1) / seen_BS1.sum(1).clamp(min=1)
        return cast(Tensor, self.layers(mean_BD))[:, 0]


def _shown(replies: Sequence[str]) -> str:
    return "  |  ".join(replies) or "(no short reply is due)"


def _padded(rows: Sequence[Sequence[int]], length: int) -> Tensor:
    """Rows of tokens, cut or filled with PAD to one length."""
    return torch.tensor([[*row[:length], *[PAD] * (length - len(row))] for row in rows])


def _seconds(work: Callable[[Tensor], Any], rows: Sequence[Tensor]) -> float:
    """For one row: the least of three turns."""
    turns = []
    for _ in range(3):
        begin = time.perf_counter()
        for row in rows:
            work(row)
        turns.append(time.perf_counter() - begin)
    return min(turns) / len(rows)


TASK = Reply

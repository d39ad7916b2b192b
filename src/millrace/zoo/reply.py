"""Offer three different short replies to a message, if it deserves one: a quick trigger before a search among replies.

Source: Kannan et al., "Smart Reply: automated response suggestion for email", KDD 2016.
Shape suffixes: B messages, S subwords of a message, T of a reply, V subwords in the vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from millrace.data.batches import Batches
from millrace.data.exchanges import Exchange, read_exchanges
from millrace.data.short_replies import ShortReplies
from millrace.data.sources import as_batches
from millrace.data.subwords import PAD, START
from millrace.data.text_files import read_text
from millrace.errors import DataError
from millrace.models.encoder_decoder import shifted
from millrace.models.replier import Replier
from millrace.models.reply_model import ReplyModel
from millrace.optim.constructors import adamw
from millrace.optim.optimizer import Optimizer
from millrace.optim.schedule import warmup_cosine
from millrace.zoo.base import Facts, Prediction, Task, TaskData
from millrace.zoo.settings import Settings, setting

_OFFERED = 3
_SEARCHED = 100  # messages whose replies are searched for at a time


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


class Reply(Task[ReplySettings]):
    """Batches {"message": [B, S], "reply": [B, T], "answered": [B] float}; without a short reply, "reply" is PAD."""

    settings_type = ReplySettings
    metric = "top3"
    monitor = "loss"  # the metric takes a search
    bar = 0.7
    _replies: ShortReplies
    _test: list[Exchange]

    def data(self, facts: Facts | None = None) -> TaskData:
        """Exchanges in parts that share no message; vocabulary and replies are those of the first part."""
        s = self.settings
        parts = read_exchanges(s.data, s.made_up, s.seed)
        if facts is None:
            facts = ShortReplies.of(parts.train, s.pieces, s.replies, s.longest, s.longest_reply).to_json()
        self._recall(facts)
        if len(set(self._replies.clusters.values())) < _OFFERED:
            raise DataError(f"There are too few different replies to offer {_OFFERED}. Give exchanges with more.")
        self._test = parts.test
        train, validation, test = map(self._replies.tensors, parts)
        return TaskData(
            as_batches(train, batch_size=s.batch_size, seed=s.seed, drop_last=True),
            as_batches(validation, batch_size=len(parts.validation), shuffle=False),
            as_batches(test, batch_size=_SEARCHED, shuffle=False, drop_last=False),
            facts=facts,
        )

    def _recall(self, facts: Facts) -> None:
        self._replies = ShortReplies.from_json(facts, self.settings.longest, self.settings.longest_reply)

    def model(self, facts: Facts) -> nn.Module:
        """The trigger, and what writes."""
        self._recall(facts)
        s = self.settings
        return ReplyModel(len(self._replies.subwords), s.width, s.layers, s.dropout)

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
        rate = warmup_cosine(s.learning_rate, steps, warmup=steps // 10, end=s.learning_rate / 20)
        return adamw(rate, betas=(0.9, 0.98), weight_decay=0.05, clip_norm=1.0)

    def evaluate(self, model: nn.Module, batches: Batches) -> dict[str, float]:
        """The trigger's precision and recall; how often one of three offers means what the reply was, and the first."""
        replier = self._replier(model)
        found = [(replier.due(batch["message"]), batch["answered"] > 0.5) for batch in batches.one_pass()]
        due, answered = (torch.cat(part) for part in zip(*found, strict=True))
        places = [place for batch in batches.one_pass() for place in replier.places(batch)]
        return {
            **super().evaluate(model, batches),
            "precision": float((due & answered).sum() / due.sum().clamp(min=1)),
            "recall": float((due & answered).sum() / answered.sum()),
            "top3": sum(place < _OFFERED for place in places) / len(places),
            "top1": sum(place == 0 for place in places) / len(places),
        }

    def _replier(self, model: nn.Module) -> Replier:
        s = self.settings
        return Replier(cast(ReplyModel, model), self._replies, s.threshold, s.beam, _OFFERED)

    def report(self, model: nn.Module, data: TaskData) -> str:
        """Hits by wording and of always offering the same, what the trigger saves, and some offers."""
        held_out = [exchange for exchange in self._test if exchange.wording == "held out"]
        known = [exchange for exchange in self._test if exchange.wording != "held out"]
        replier = self._replier(model)
        lines = ["one of three offers means what the reply was:"]
        for name, part in (("messages in wordings that were trained on", known), ("… that were not", held_out)):
            if any(self._replies.is_short(exchange.reply) for exchange in part):
                places = replier.places(self._replies.tensors(part))
                hits = sum(place < _OFFERED for place in places) / len(places)
                lines += [f"  {hits:6.1%}  {name} ({len(places)})"]
        frequent, share = self._always_the_same(data)
        lines += [f"  {share:6.1%}  always offering the three most frequent: {', '.join(frequent)}", ""]
        cascade = replier.cascade(self._replies.tensors(self._test)["message"])
        lines += [
            f"the trigger takes {1e3 * cascade.quick_s:.2f} ms a message and lets {cascade.passed:.0%} pass to the "
            f"search, which takes {1e3 * cascade.slow_s:.1f} ms: {cascade.saved:.0%} of the time is saved"
        ]
        for message in self.examples(8):
            lines += ["", f"  {message}", f"  → {_shown(replier.said(message))}"]
        return "\n".join(lines)

    def _always_the_same(self, data: TaskData) -> tuple[list[str], float]:
        """The most frequent clusters, and how often the reply is one of them."""
        replied = [e.cluster for e in self._test if self._replies.is_short(e.reply)]
        trained = (reply for batch in data.train.one_pass() for reply in batch["reply"].tolist() if any(reply))
        counted = Counter(self._replies.clusters.get(self._replies.subwords.decode(reply), "") for reply in trained)
        frequent = [cluster for cluster, _ in counted.most_common(_OFFERED)]
        return frequent, sum(cluster in frequent for cluster in replied) / len(replied)

    def examples(self, count: int) -> list[str]:
        """Some messages of the test, from all over it, once there is `data`."""
        return [exchange.message for exchange in self._test[:: max(1, len(self._test) // count)][:count]]

    def said(self, model: nn.Module, message: str) -> list[str]:
        """Three replies to a message; none where no short reply is due."""
        return self._replier(model).said(message)

    def predict(self, model: nn.Module, file: Path, facts: Facts) -> Prediction:
        """Three replies to the message in a file, or none."""
        self._recall(facts)
        message = " ".join(read_text(file).split())
        if not message:
            raise DataError(f"The message {file} is empty. Give a file of plain text.")
        replies = self.said(model, message)
        return Prediction(_shown(replies), {"replies": list(replies)})


def _shown(replies: Sequence[str]) -> str:
    return "  |  ".join(replies) or "(no short reply is due)"


TASK = Reply

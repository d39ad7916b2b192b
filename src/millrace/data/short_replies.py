"""Short replies: which of those that people gave may be offered, and exchanges as tensors of subwords.

Shape suffixes: B messages, S subwords of a message, T of a reply.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from millrace.data.batches import Json
from millrace.data.exchanges import Exchange, plain
from millrace.data.padding import padded
from millrace.data.subwords import END, Subwords


@dataclass(frozen=True)
class ShortReplies:
    """A vocabulary, and the replies that may be offered."""

    subwords: Subwords
    clusters: Mapping[str, str]  # of every reply that may be offered; replies of one cluster mean the same
    longest: int  # subwords of a message that are read: its first ones
    longest_reply: int  # subwords of a reply that is still a short one, END among them

    @classmethod
    def of(
        cls, exchanges: Sequence[Exchange], pieces: int, count: int, longest: int, longest_reply: int
    ) -> ShortReplies:
        """Those of exchanges to train on.

        Args:
            exchanges: to learn subwords from, and to take replies from.
            pieces: subwords at most.
            count: of the short replies, the most frequent, may be offered.
            longest, longest_reply: as the class has them.
        """
        texts = [text for exchange in exchanges for text in (exchange.message, exchange.reply)]
        found = cls(Subwords.of(texts, pieces), {}, longest, longest_reply)
        counted = Counter(exchange.reply for exchange in exchanges if found.is_short(exchange.reply))
        clusters = {exchange.reply: exchange.cluster for exchange in exchanges}
        return replace(found, clusters={reply: clusters[reply] for reply, _ in counted.most_common(count)})

    def to_json(self) -> dict[str, Json]:
        """Vocabulary and replies as a JSON value for `from_json`."""
        return {"subwords": self.subwords.to_json(), "replies": dict(self.clusters)}

    @classmethod
    def from_json(cls, value: Mapping[str, Json], longest: int, longest_reply: int) -> ShortReplies:
        """What `to_json` wrote."""
        subwords = Subwords.from_json(cast("Mapping[str, Json]", value["subwords"]))
        return cls(subwords, cast("Mapping[str, str]", value["replies"]), longest, longest_reply)

    def is_short(self, reply: str) -> bool:
        """Whether it is a reply, and has at most `longest_reply` subwords with its END."""
        return bool(reply) and len(self.subwords.encode(reply)) < self.longest_reply

    def cluster(self, reply: str) -> str:
        """What a reply means; one that may not be offered means the same as those that differ in punctuation alone."""
        return self.clusters.get(reply, plain(reply))

    def sequences(self) -> dict[tuple[int, ...], str]:
        """The clusters of the subwords, without END, of all replies that may be offered."""
        return {tuple(self.subwords.encode(reply)): cluster for reply, cluster in self.clusters.items()}

    def tensors(self, exchanges: Sequence[Exchange]) -> dict[str, Tensor]:
        """{"message": [B, S], "reply": [B, T], "answered": [B] float}; PAD fills both, and all of a reply that is not
        short."""
        messages = [self.subwords.encode(exchange.message) for exchange in exchanges]
        replies = [[*self.subwords.encode(e.reply), END] if self.is_short(e.reply) else [] for e in exchanges]
        return {
            "message": padded(messages, self.longest),
            "reply": padded(replies, self.longest_reply),
            "answered": torch.tensor([float(bool(reply)) for reply in replies]),
        }

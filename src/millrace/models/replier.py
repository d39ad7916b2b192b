"""A trained model of short replies in use: which messages deserve some, which ones, and what the quick look saves.

Shape suffixes: B messages, S subwords of a message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from millrace.data.exchanges import Exchange
from millrace.data.short_replies import ShortReplies
from millrace.data.subwords import END, START
from millrace.models.beam import Allowed, Beam, Hypothesis
from millrace.models.cascade import Cascade, seconds_each
from millrace.models.encoder_decoder import search
from millrace.models.offers import Offer, offers
from millrace.models.reply_model import ReplyModel


@dataclass(frozen=True)
class Replier:
    """Offers some different replies to messages that deserve a short one."""

    model: ReplyModel  # in evaluation mode
    replies: ShortReplies
    threshold: float  # probability that a reply is due, from which on replies are offered
    width: int  # hypotheses of the search
    count: int = 3  # of the replies that are offered

    @torch.no_grad()
    def due(self, message_BS: Tensor) -> Tensor:
        """For which messages replies are offered, bool [B], on the CPU."""
        due_B = self.model.trigger(message_BS.to(next(self.model.parameters()).device))
        return (due_B.sigmoid() >= self.threshold).cpu()

    def offers(self, message_BS: Tensor) -> list[list[Offer]]:
        """`count` replies to each message, due or not, of as many clusters, the likeliest first."""
        beam = Beam(START, END, self.width, self.replies.longest_reply, length_penalty=0.0)

        def searched(source_BS: Tensor, allowed: Allowed) -> list[list[Hypothesis]]:
            return search(self.model.writer, source_BS, beam, allowed)

        return offers(searched, message_BS, self.replies.sequences(), END, self.count)

    def said(self, message: str) -> list[str]:
        """The replies that are offered to a message; none where no short reply is due."""
        message_1S = self.replies.tensors([Exchange(message, "", "")])["message"]
        offered = self.offers(message_1S)[0] if bool(self.due(message_1S)[0]) else []
        return [self.replies.subwords.decode(offer.tokens) for offer in offered]

    def places(self, batch: Mapping[str, Tensor]) -> list[int]:
        """Of the messages that got a reply: the place of the offer that means the same; `count` where there is none.

        Args: batch: as `ShortReplies.tensors` makes them.
        """
        rows = batch["answered"] > 0.5
        said = [self.replies.subwords.decode(row) for row in batch["reply"][rows].tolist()]
        places = []
        for reply, offered in zip(said, self.offers(batch["message"][rows]) if said else [], strict=True):
            clusters, wanted = [offer.cluster for offer in offered], self.replies.cluster(reply)
            places.append(clusters.index(wanted) if wanted in clusters else self.count)
        return places

    def cascade(self, message_BS: Tensor, timed: int = 20) -> Cascade:
        """What the trigger takes and saves, a message at a time; the first `timed` messages are used for the times."""
        examples = message_BS[:timed].split(1)
        passed = float(self.due(message_BS).float().mean())
        return Cascade(seconds_each(self.due, examples), seconds_each(self.offers, examples), passed)

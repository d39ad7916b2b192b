"""A replier: what is due, offers that are allowed and mean different things, their places, and what is saved."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("tokenizers")
from millrace.data.exchanges import Exchange
from millrace.data.short_replies import ShortReplies
from millrace.models.replier import Replier
from millrace.models.reply_model import ReplyModel, Trigger

REPLIES = {"Yes, gladly!": "yes", "Sure": "yes", "No, sorry.": "no", "Maybe.": "maybe", "Thanks!": "thanks"}
GIVEN = [Exchange(f"Lunch on day {n}?", reply, REPLIES[reply]) for n, reply in enumerate(REPLIES)]


@pytest.fixture(scope="module")
def replier() -> Replier:
    replies = ShortReplies.of(GIVEN, pieces=300, count=9, longest=24, longest_reply=16)
    torch.manual_seed(0)
    model = ReplyModel(len(replies.subwords), width=8, layers=2, dropout=0.0).eval()
    return Replier(model, replies, threshold=0.5, width=3)


def test_offers_are_allowed_and_mean_different_things(replier: Replier) -> None:
    for offered in replier.offers(torch.randint(3, 259, (12, 24), generator=torch.Generator().manual_seed(0))):
        assert len({offer.cluster for offer in offered}) == len(offered) == 3
        assert all(REPLIES[replier.replies.subwords.decode(offer.tokens)] == offer.cluster for offer in offered)


def test_the_threshold_decides_what_gets_replies(replier: Replier) -> None:
    always, never = replace(replier, threshold=0.0), replace(replier, threshold=1.0)
    assert len(set(always.said("Lunch?")) & set(REPLIES)) == 3
    assert never.said("Lunch?") == []


def test_places_are_those_of_the_cluster_that_was_meant(replier: Replier) -> None:
    asked = [*GIVEN, Exchange("Receipt", "", ""), Exchange("And?", "something else", "")]
    found = replier.places(replier.replies.tensors(asked))
    assert len(found) == len(GIVEN) + 1
    offered = replier.offers(replier.replies.tensors(GIVEN)["message"])
    for exchange, place, those in zip(GIVEN, found, offered, strict=False):
        clusters = [offer.cluster for offer in those]
        assert clusters[place] == exchange.cluster if place < 3 else exchange.cluster not in clusters
    assert found[-1] == 3
    assert replier.places(replier.replies.tensors([Exchange("Receipt", "", "")])) == []


def test_what_the_trigger_lets_pass_is_counted_over_all_messages(replier: Replier) -> None:
    message = replier.replies.tensors(GIVEN)["message"]
    cascade = replier.cascade(message, timed=2)
    assert cascade.passed == pytest.approx(float(replier.due(message).float().mean()))
    assert cascade.slow_s > cascade.quick_s > 0


def test_the_trigger_does_not_see_padding() -> None:
    torch.manual_seed(0)
    trigger = Trigger(vocabulary=50, width=8, dropout=0.0)
    message = torch.randint(3, 50, (4, 6))
    padded = torch.nn.functional.pad(message, (0, 5))
    assert torch.allclose(trigger(message), trigger(padded), atol=1e-6)
    assert trigger(torch.zeros(1, 6, dtype=torch.int64)).isfinite().all()

"""Short replies: the frequent ones may be offered, long ones count as none, and all of it survives JSON."""

from __future__ import annotations

import json

import pytest
import torch

from millrace.data.exchanges import Exchange
from millrace.data.subwords import END, PAD

pytest.importorskip("tokenizers")
from millrace.data.short_replies import ShortReplies

LONG = "I have thought about it for a long time, and so I would rather not say anything."
GIVEN = [
    *[Exchange("Lunch today?", "Sure!", "yes")] * 4,
    *[Exchange("Dinner tonight?", "Yes, gladly!", "yes")] * 3,
    *[Exchange("Call me back", "I'm busy.", "no")] * 2,
    Exchange("A secret?", "Never heard of it", "no"),
    *[Exchange("What do you think?", LONG, "long")] * 9,
    *[Exchange("Receipt", "", "")] * 9,
]


def replies(count: int = 3) -> ShortReplies:
    return ShortReplies.of(GIVEN, pieces=320, count=count, longest=6, longest_reply=20)


def test_the_most_frequent_short_ones_may_be_offered() -> None:
    found = replies()
    assert found.clusters == {"Sure!": "yes", "Yes, gladly!": "yes", "I'm busy.": "no"}
    assert not found.is_short(LONG)
    assert not found.is_short("")
    assert found.cluster("Sure!") == "yes"
    assert found.cluster("Never, HEARD of it!") == "never heard of it"


def test_sequences_spell_the_replies() -> None:
    found = replies()
    spelled = {found.subwords.decode(tokens): cluster for tokens, cluster in found.sequences().items()}
    assert spelled == found.clusters


def test_tensors_are_padded_and_a_long_reply_counts_as_none() -> None:
    found = replies()
    batch = found.tensors([GIVEN[0], Exchange("m", LONG, ""), Exchange("m", "", "")])
    assert batch["message"].shape == (3, 6)
    assert batch["reply"].shape == (3, 20)
    assert batch["answered"].tolist() == [1, 0, 0]
    assert batch["reply"][1:].eq(PAD).all()
    said = batch["reply"][0].tolist()
    assert said[said.index(END) + 1 :] == [PAD] * (19 - said.index(END))
    assert found.subwords.decode(said) == "Sure!"


def test_they_survive_json() -> None:
    found = replies()
    again = ShortReplies.from_json(json.loads(json.dumps(found.to_json())), 6, 20)
    assert again.clusters == found.clusters
    one, other = (which.tensors(GIVEN[:1]) for which in (found, again))
    assert all(torch.equal(one[name], other[name]) for name in one)

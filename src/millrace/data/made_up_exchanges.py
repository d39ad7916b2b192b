"""Made-up messages and short replies, where no real ones are at hand: the whole grammar is in this file.

A message is an opening, one of an intent's wordings with its slots filled, and a closing. An intent has clusters of
replies, which it gets with different probabilities; the replies of a cluster mean the same. Half of all messages
deserve no short reply. The last two wordings of every intent are held out: nothing that is trained on is said so.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]
_SLOTS = {
    "day": _DAYS,
    "time": ["nine", "ten", "half past ten", "noon", "two", "three", "half past four", "six", "seven"],
    "name": [
        "Ana",
        "Ben",
        "Chloe",
        "David",
        "Emma",
        "Farid",
        "Grace",
        "Hugo",
        "Ines",
        "Jon",
        "Kim",
        "Lena",
        "Mo",
        "Nora",
    ],
    "file": ["report", "slides", "contract", "budget", "draft", "photos", "invoice", "schedule", "proposal", "minutes"],
    "meal": ["lunch", "dinner", "coffee", "breakfast", "tea", "a drink", "pizza", "a sandwich"],
    "event": ["concert", "game", "party", "workshop", "match", "play", "exhibition", "picnic", "trip"],
    "place": ["the station", "the office", "the park", "the library", "the airport", "the museum", "the harbour"],
    "feat": ["promotion", "new job", "exam", "prize", "new house", "engagement", "degree", "marathon"],
    "shop": ["Northwind", "Acorn Books", "Bluebird Travel", "Cityphone", "Greengrocer", "Papershop"],
    "sum": ["12.50", "39.90", "7.25", "120.00", "64.10", "18.75"],
    "topic": ["the migration", "our pricing", "the new office", "hiring", "the roadmap", "the outage", "the merger"],
}
_OPENINGS = ["", "", "Hi,", "Hello {name},", "Hey {name},", "Dear {name},", "Good morning,"]
_CLOSINGS = ["", "", "Best, {name}", "Cheers", "{name}", "Thanks, {name}", "Have a nice day!"]


@dataclass(frozen=True)
class _Intent:
    wordings: Sequence[str]
    replies: Sequence[tuple[float, str, Sequence[str]]]  # probability, cluster, what means the same; none: no reply


_INTENTS = [
    _Intent(
        [
            "Do you want to have {meal} with me on {day}?",
            "How about {meal} on {day}?",
            "Shall we get {meal} together on {day}?",
            "Would you like to join us for {meal} on {day}?",
            "Are you free for {meal} on {day} at {time}?",
            "I would love to have {meal} with you on {day}. Are you in?",
            "Want to grab {meal} on {day}?",
            "Fancy {meal} at {time} on {day}?",
        ],
        [
            (0.55, "accept", ["Sure, I'd love to!", "Yes, sounds great!", "I'd love to come."]),
            (0.3, "decline", ["Sorry, I can't make it.", "Sadly I have other plans.", "I can't, sorry."]),
            (0.15, "maybe", ["Maybe, I'll let you know.", "Let me check and get back to you."]),
        ],
    ),
    _Intent(
        [
            "Can we meet on {day} at {time}?",
            "Would {day} at {time} work for you?",
            "Does {day} at {time} suit you for the meeting?",
            "Could we move our meeting to {day} at {time}?",
            "I suggest that we meet on {day} at {time}.",
            "Is {day} at {time} good for a call?",
            "Are you available on {day} at {time}?",
            "Let us meet on {day}, say at {time}?",
        ],
        [
            (0.6, "time works", ["Works for me.", "Yes, that time is fine.", "That works, see you then."]),
            (0.25, "other time", ["Can we find another time?", "That doesn't work for me."]),
            (0.15, "maybe", ["Maybe, I'll let you know.", "Let me check and get back to you."]),
        ],
    ),
    _Intent(
        [
            "Do you prefer {day} or {other}?",
            "Should we do it on {day} or on {other}?",
            "Which is better for you, {day} or {other}?",
            "Is {day} or {other} easier for you?",
            "Would you rather come on {day} or {other}?",
            "{day} or {other}, what do you think?",
            "Shall I book {day} or {other}?",
        ],
        [
            (0.45, "{day}", ["{day} works for me.", "{day} is better."]),
            (0.35, "{other}", ["{other} works for me.", "{other} is better."]),
            (0.2, "either", ["Either is fine.", "Both work for me."]),
        ],
    ),
    _Intent(
        [
            "Could you send me the {file}?",
            "Can you share the {file} with me?",
            "Please send the {file} when you can.",
            "I need the {file} for {day}. Can you send it?",
            "Do you have the {file}? I can't find it.",
            "Would you mind sending me the {file}?",
            "Can I get a copy of the {file} from you?",
            "Please forward the {file} to me.",
        ],
        [
            (0.45, "will send", ["I'll send it today.", "Sure, I'll send it.", "Will do."]),
            (0.35, "here it is", ["Here it is.", "It's attached."]),
            (0.2, "do not have it", ["I don't have it.", "I couldn't find it either."]),
        ],
    ),
    _Intent(
        [
            "Here is the {file}. Let me know what you think.",
            "I attached the {file} for you.",
            "Please find the {file} attached.",
            "The {file} is in the folder now. Any comments?",
            "I have finished the {file}. Could you have a look?",
            "I uploaded the {file}, please review it.",
            "You will find my {file} below. What do you think of it?",
        ],
        [
            (0.5, "thanks, will look", ["Thanks, I'll take a look.", "Thank you, I will read it."]),
            (0.35, "looks good", ["Looks good to me!", "It looks great."]),
            (0.15, "has comments", ["I have a few comments.", "Some things need to change."]),
        ],
    ),
    _Intent(
        [
            "Is the {file} ready?",
            "Have you finished the {file}?",
            "How far are you with the {file}?",
            "Is the {file} done yet?",
            "When will the {file} be ready?",
            "Did you get the {file} done?",
            "Any progress with the {file}?",
        ],
        [
            (0.4, "done", ["Yes, it's done.", "It's ready."]),
            (0.35, "not yet", ["Not yet, sorry.", "I'm still working on it."]),
            (0.25, "almost", ["Almost done.", "I'll finish it today."]),
        ],
    ),
    _Intent(
        [
            "Where are you? We are waiting at {place}.",
            "Are you at {place} already?",
            "When will you be at {place}?",
            "I am at {place}. Are you coming?",
            "We are at {place}, where are you?",
            "How long until you get to {place}?",
            "Have you left yet? We are already at {place}.",
        ],
        [
            (0.5, "on my way", ["I'm on my way.", "Be there soon."]),
            (0.3, "late", ["I'm running late.", "I'll be ten minutes late."]),
            (0.2, "there", ["I'm here.", "I'm already there."]),
        ],
    ),
    _Intent(
        [
            "Congratulations on your {feat}!",
            "I just heard about your {feat}. Well done!",
            "So happy for you, what a great {feat}!",
            "Great news about the {feat}, congratulations!",
            "Well done with the {feat}, you deserve it!",
            "Wow, I heard of your {feat}!",
            "We are all proud of you for the {feat}.",
        ],
        [
            (0.7, "thanks", ["Thank you so much!", "Thanks a lot!", "Thanks!"]),
            (0.3, "so kind", ["That's so kind of you.", "You are too kind."]),
        ],
    ),
    _Intent(
        [
            "Thank you for your help with the {file}.",
            "Thanks for coming to the {event}!",
            "Many thanks for the {file}.",
            "I really appreciate your help on {day}.",
            "Thank you for driving me to {place}.",
            "Thanks again for {meal} on {day}.",
            "I am so grateful that you helped with the {event}.",
        ],
        [
            (0.65, "welcome", ["You're welcome!", "My pleasure.", "Happy to help."]),
            (0.35, "any time", ["Any time!", "No problem at all."]),
        ],
    ),
    _Intent(
        [
            "Sorry, I will be late for the {event}.",
            "I have to cancel {meal} on {day}, I am sorry.",
            "Unfortunately I can't come on {day}.",
            "I am so sorry that I missed the {event}.",
            "Sorry for the delay with the {file}.",
            "My apologies, I forgot the {file}.",
            "I am afraid I won't make it to the {event}.",
        ],
        [
            (0.6, "no problem", ["No worries!", "No problem."]),
            (0.4, "another day", ["Let's do it another day.", "Another time, then."]),
        ],
    ),
    _Intent(
        [
            "I am ill today and will stay at home.",
            "I have a fever and can't come on {day}.",
            "I am not feeling well, so I will skip the {event}.",
            "The doctor says I have to stay in bed until {day}.",
            "I caught a bad cold and won't be in on {day}.",
            "I feel sick and must rest today.",
        ],
        [
            (0.7, "get well", ["Get well soon!", "Feel better soon."]),
            (0.3, "take your time", ["Take your time.", "Don't worry about work."]),
        ],
    ),
    _Intent(
        [
            "We won the {event}!",
            "I passed the exam!",
            "Guess what, I got the job!",
            "The {event} was a huge success!",
            "They accepted our {file}!",
            "We finally finished the {file}!",
            "I got the {feat}!",
        ],
        [
            (0.6, "great news", ["That's great news!", "Wonderful!"]),
            (0.4, "congratulations", ["Congratulations!", "Well done!"]),
        ],
    ),
    _Intent(
        [
            "Call me when you have a minute.",
            "Can you call me about the {file}?",
            "Please ring me before {day}.",
            "Could you give me a call at {time}?",
            "I tried to reach you, please call back.",
            "Give me a ring when you are at {place}.",
        ],
        [
            (0.5, "will call", ["I'll call you soon.", "Calling you now."]),
            (0.3, "later", ["Can I call you later?", "I'm busy, I'll call tonight."]),
            (0.2, "email", ["Can you write me instead?", "Please send me an email."]),
        ],
    ),
    _Intent(
        [
            "See you on {day}!",
            "See you at the {event}!",
            "Looking forward to {day}!",
            "I will see you at {place} at {time}.",
            "Till {day}, then!",
            "I can't wait to see you at the {event}.",
        ],
        [
            (0.6, "see you", ["See you then!", "See you soon!"]),
            (0.4, "looking forward", ["Looking forward to it!", "Can't wait!"]),
        ],
    ),
    # What deserves no short reply: what machines send, what is only told, and what needs a long answer.
    _Intent(
        [
            "Your order from {shop} has been shipped and will arrive on {day}.",
            "Thank you for shopping at {shop}. Your total was {sum}.",
            "{shop}: your invoice of {sum} is now available online.",
            "Receipt from {shop}: {sum} paid by card on {day}.",
            "Your {shop} package was delivered to {place}.",
            "{shop} has refunded {sum} to your account.",
            "Reminder: your {shop} bill of {sum} is due on {day}.",
        ],
        [],
    ),
    _Intent(
        [
            "Save 20 percent at {shop} until {day}! Click here to see all offers.",
            "{shop} newsletter: ten ideas for {meal} this week.",
            "New at {shop}: everything for your {event}. Shop now.",
            "Only until {day}: free delivery from {shop}.",
            "Members of {shop} get tickets for the {event} first. Log in to book.",
            "Last chance! The {shop} sale ends on {day}.",
            "Discover the best of {shop} for {sum} a month. Unsubscribe here.",
        ],
        [],
    ),
    _Intent(
        [
            "Your password was changed at {time}. If this was not you, contact support.",
            "A new device signed in to your account near {place}.",
            "Your verification code is {sum}. Do not share it.",
            "Automatic message: the system will be down on {day} from {time}.",
            "The nightly build failed at {time}. See the log for details.",
            "{name} shared the {file} with the team folder.",
            "Calendar: the {event} starts on {day} at {time}.",
            "This is an automatic reply. I am away until {day}.",
        ],
        [],
    ),
    _Intent(
        [
            "For your information, the {file} was moved to the archive.",
            "All staff: the office will be closed on {day}.",
            "Note that the {event} takes place at {place} this year.",
            "The minutes of the meeting on {day} are in the folder.",
            "The lift at {place} is out of order until {day}.",
            "Parking at {place} will not be possible on {day}.",
            "FYI: {name} takes over {topic} from {day} on.",
        ],
        [],
    ),
    _Intent(
        [
            "Please explain in detail how we should go on with {topic}, with numbers for each quarter.",
            "What went wrong with {topic}? I need the whole story, with all dates.",
            "Write down your thoughts on {topic} and the risks that you see.",
            "Compare the three plans for {topic} and give reasons for your choice.",
            "Describe what your team did about {topic} since last year.",
            "I would like a full analysis of {topic}, including costs.",
            "Tell me everything that you know about {topic}, step by step.",
        ],
        [],
    ),
]
_HELD_OUT = 2  # wordings of each intent
_SHARE_REPLIED = 0.5


def made_up(count: int, seed: int) -> list[tuple[str, str, str, str]]:
    """Messages, each once, with reply ("" for none), its cluster, and "held out" for a wording that is for the test."""
    draw = random.Random(seed)
    found: dict[str, tuple[str, str, str, str]] = {}
    while len(found) < count:
        is_replied = draw.random() < _SHARE_REPLIED
        intent = draw.choice([intent for intent in _INTENTS if bool(intent.replies) == is_replied])
        number = draw.randrange(len(intent.wordings))
        slots = {slot: draw.choice(values) for slot, values in _SLOTS.items()}
        slots["other"] = draw.choice([day for day in _DAYS if day != slots["day"]])
        parts = (draw.choice(_OPENINGS), intent.wordings[number], draw.choice(_CLOSINGS))
        message = " ".join(part for part in parts if part).format_map(slots)
        reply = cluster = ""
        if intent.replies:
            weights = [probability for probability, _, _ in intent.replies]
            _, cluster, same = draw.choices(intent.replies, weights)[0]
            reply, cluster = draw.choice(same).format_map(slots), cluster.format_map(slots)
        wording = "held out" if number >= len(intent.wordings) - _HELD_OUT else "known"
        found.setdefault(message, (message, reply, cluster, wording))
    return list(found.values())

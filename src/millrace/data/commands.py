"""Short English commands and strings of digits, drawn from a small grammar, and said by espeak-ng in many voices."""

from __future__ import annotations

import torch

from millrace.data.audio import SpokenSentences
from millrace.data.espeak import Espeak, Utterance, spoken
from millrace.data.randomness import generator_from
from millrace.data.split import holdout

ACCENTS = ("en", "en-us", "en-029", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-us-nyc")
_NOBODY = {"Demonic", "whisper", "whisperf"}  # no voice that people speak with

_DIGITS = "zero one two three four five six seven eight nine"
_PARTS = {
    "digit": _DIGITS,
    "tens": "ten twenty thirty forty fifty",
    "unit": "seconds minutes hours",
    "clock": "timer alarm",
    "switch": "on off",
    "place": "kitchen bedroom bathroom garden hall office",
    "device": "light heater radio fan door camera",
    "act": "open close lock check",
    "media": "play stop repeat skip",
    "which": "this next last",
    "piece": "song film book message",
    "day": "now today tomorrow tonight",
    "asked": "time weather news date",
    "city": "london paris rome berlin madrid vienna",
    "goods": "milk bread butter coffee sugar apples",
    "person": "anna peter susan david maria robert",
}
_FORMS = (
    "{digit} {digit} {digit} {digit}",
    "{digit} {digit} {digit} {digit} {digit}",
    "call {digit} {digit} {digit} {digit}",
    "call {person} in the {place}",
    "set the {clock} to {tens} {digit} {unit}",
    "set the {clock} to {digit} {unit}",
    "turn {switch} the {place} {device}",
    "{act} the {place} door {day}",
    "{media} the {which} {piece} for {person}",
    "tell me the {asked} in {city} {day}",
    "buy {digit} {goods} and {goods}",
    "add {goods} to the list for {person}",
    "volume {tens} {digit} in the {place}",
)


def vocabulary() -> list[str]:
    """Every word that a command can hold, sorted."""
    fixed = " ".join(_FORMS).replace("{", " {").split()
    return sorted({word for word in fixed if not word.startswith("{")} | set(" ".join(_PARTS.values()).split()))


def command(generator: torch.Generator) -> str:
    """A command drawn at random: a form, and for each of its places a word."""
    words = []
    for place in _FORMS[_draw(len(_FORMS), generator)].split():
        choices = _PARTS[place.strip("{}")].split() if place.startswith("{") else [place]
        words.append(choices[_draw(len(choices), generator)])
    return " ".join(words)


def commands(count: int, generator: torch.Generator, apart_from: frozenset[str] = frozenset()) -> list[str]:
    """So many commands, none of them twice and none of those that are held out."""
    found: dict[str, None] = {}
    while len(found) < count:
        text = command(generator)
        if text not in apart_from:
            found[text] = None
    return list(found)


def speakers(espeak: Espeak, seed: int) -> tuple[list[str], list[str], list[str]]:
    """espeak-ng's variants in three parts: about 70 %, 10 % and 20 % of them, at random.

    Those whose names differ by a number only are often made from each other, so they stay together.
    """
    names = [name for name in espeak.variants() if name not in _NOBODY]
    families = sorted({name.rstrip("0123456789").lower() for name in names})
    rest, test = holdout(len(families), 0.2, seed)
    inner = holdout(len(rest), 0.12, seed)
    parts = (rest[inner.train], rest[inner.held_out], test)
    chosen = [{families[number] for number in part.tolist()} for part in parts]
    first, second, third = ([n for n in names if n.rstrip("0123456789").lower() in part] for part in chosen)
    return first, second, third


def spoken_commands(
    espeak: Espeak, rate_hz: int, counts: tuple[int, int, int], longest_s: float, seed: int
) -> tuple[SpokenSentences, SpokenSentences, SpokenSentences]:
    """Commands in three parts that share neither a text nor a speaker; the accents are the same in all.

    Args:
        espeak: says them.
        rate_hz: samples per second.
        counts: commands in each part.
        longest_s: what takes a slow voice longer than this is left out (then there are fewer).
        seed: of texts, voices, speeds and pitches.

    Raises: DataError: espeak-ng cannot be used.
    """
    parts, taken = [], frozenset[str]()
    # The held-out texts are drawn first, so that they stay the same when more is learned from.
    for number, names in reversed(list(enumerate(speakers(espeak, seed)))):
        generator = generator_from("commands", seed, number)
        texts = commands(counts[number], generator, taken)
        taken |= frozenset(texts)
        said = spoken([_utterance(text, names, generator) for text in texts], espeak, rate_hz)
        kept = [n for n, samples in enumerate(said) if len(samples) <= longest_s * rate_hz]
        parts.append(SpokenSentences([said[n] for n in kept], [texts[n] for n in kept]))
    return parts[2], parts[1], parts[0]


def _utterance(text: str, names: list[str], generator: torch.Generator) -> Utterance:
    voice = f"{ACCENTS[_draw(len(ACCENTS), generator)]}+{names[_draw(len(names), generator)]}"
    return Utterance(text, voice, 130 + _draw(56, generator), 30 + _draw(41, generator))


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))

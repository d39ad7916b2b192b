"""Understand spoken commands, in noise too: a bidirectional LSTM with CTC on speech that a data factory multiplies.

Shape suffixes: B utterances, F frames (10 ms), T steps of the network (30 ms), M mel bands, V letters and the blank.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from millrace.data.audio import SpokenSentences, read_wav, sentence_folder, sentence_table
from millrace.data.batches import Batches
from millrace.data.commands import spoken_commands
from millrace.data.espeak import Espeak
from millrace.data.factory import Factory, Recipe
from millrace.data.log_mel import LogMel
from millrace.data.noise import loudness
from millrace.data.prefetch import prefetched
from millrace.data.speech import AtDecibels, speech_batches
from millrace.data.split import holdout
from millrace.data.text import CharVocabulary
from millrace.errors import DataError
from millrace.models.ctc import BLANK, WordTree, beam_search, edit_distance, greedy
from millrace.optim.constructors import adamw
from millrace.optim.optimizer import Optimizer
from millrace.optim.schedule import Cosine, Warmup
from millrace.zoo.base import Facts, Pictures, Prediction, Task, TaskData
from millrace.zoo.extras import require
from millrace.zoo.settings import Settings, setting

RATE_HZ, BANDS, STRIDE = 8000, 40, 3  # of a telephone; mel bands; frames per step of the network
CONDITIONS = {"clean": math.inf, "20db": 20.0, "10db": 10.0, "5db": 5.0, "0db": 0.0}  # speech over noise
_SPLIT_SEED = 0  # who and what is held out never changes, whatever the run's seed


@dataclass(frozen=True)
class SpeechSettings(Settings):
    """Defaults that learn for about five minutes."""

    steps: int | None = setting(1500, "stop after so many steps", low=1, on_resume=True)
    batch_size: int = setting(32, "utterances per step", low=1)
    evaluate_every: int | None = setting(250, "steps between evaluations", low=1, on_resume=True)
    checkpoint_every: int | None = setting(250, "steps between checkpoints", low=1, on_resume=True)
    threads: int | None = setting(1, "of the CPU to train with; the factory works on another", low=1, on_resume=True)
    data: str = setting("", "a folder of NAME.wav and NAME.txt, or the name of a Hugging Face data set")
    utterances: int = setting(1800, "clean utterances that espeak-ng makes to learn from", low=32)
    factory: bool = setting(True, "multiply the clean utterances: noise, rooms, speeds and volumes")
    copies: int = setting(10, "versions of every clean utterance that the factory makes", low=1)
    max_s: float = setting(2.7, "the longest utterance, in seconds", low=0.5)
    width: int = setting(96, "of the convolutions, and of the LSTM in each direction", low=8)
    layers: int = setting(2, "of the LSTM", low=1)
    dropout: float = setting(0.1, "share of the features left out between layers", low=0, high=0.9)
    learning_rate: float = setting(3e-3, "at the top of the schedule", low=0)


class Speech(Task[SpeechSettings]):
    """Batches of `millrace.data.speech`: features [B, F, M] and letters; log-probabilities [B, T, V]."""

    settings_type = SpeechSettings
    metric = "word_error"  # wrong words over words, all conditions together
    better = "min"
    monitor = "loss"

    def data(self, facts: Facts | None = None) -> TaskData:
        """Texts and speakers of the three parts differ; the last two are heard under each condition."""
        s = self.settings
        train, validation, test = _own(s.data) if s.data else self._made()
        vocabulary = CharVocabulary.of("".join([*train.texts, *validation.texts, *test.texts]))
        self._check_lengths([*train.recordings, *validation.recordings, *test.recordings])
        facts = facts or {"letters": vocabulary.to_json(), "words": sorted(set(" ".join(train.texts).split()))}
        learned = Factory(train.recordings, RATE_HZ, Recipe(copies=s.copies), s.seed) if s.factory else train.recordings
        frames, features = self._frames(), Features()

        def letters(part: SpokenSentences) -> list[Tensor]:
            return [_vocabulary(facts).encode(text) + 1 for text in part.texts]

        def held_out(part: SpokenSentences) -> Batches:
            recordings = AtDecibels(
                part.recordings, RATE_HZ, [*CONDITIONS.values()], Recipe().noises, part.recordings, _SPLIT_SEED
            )
            return speech_batches(recordings, letters(part), features, frames, batch_size=s.batch_size, shuffle=False)

        batches = speech_batches(learned, letters(train), features, frames, batch_size=s.batch_size, seed=s.seed)
        return TaskData(prefetched(batches, 4), held_out(validation), held_out(test), facts)

    def _made(self) -> tuple[SpokenSentences, SpokenSentences, SpokenSentences]:
        loader = require("espeakng_loader", extra="zoo", package="espeakng-loader")
        espeak = Espeak(Path(loader.get_library_path()), Path(loader.get_data_path()))
        longest_s = self.settings.max_s * Recipe().speed[0]
        return spoken_commands(espeak, RATE_HZ, (self.settings.utterances, 60, 200), longest_s, _SPLIT_SEED)

    def _frames(self) -> int:
        return -(-Features().log_mel.frames(round(self.settings.max_s * RATE_HZ)) // STRIDE) * STRIDE

    def _check_lengths(self, recordings: list[Tensor]) -> None:
        longest = max(len(recording) for recording in recordings) / RATE_HZ
        slowest = Recipe().speed[0] if self.settings.factory else 1.0
        if longest / slowest > self.settings.max_s:
            raise DataError(
                f"The longest recording takes {longest:.1f} s, said most slowly {longest / slowest:.1f} s, but "
                f"max_s={self.settings.max_s:g}. Set max_s higher, or leave long recordings out."
            )

    def model(self, facts: Facts) -> nn.Module:
        """As wide and deep as the settings say."""
        s = self.settings
        return Recognizer(_vocabulary(facts).characters, s.width, s.layers, s.dropout)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """CTC, per letter; an utterance with more letters than steps counts 0."""
        log_probabilities_BTV = model(batch["features"])
        steps = (batch["frames"] + STRIDE - 1) // STRIDE
        path_TBV = log_probabilities_BTV.transpose(0, 1)
        return functional.ctc_loss(path_TBV, batch["letters"], steps, batch["lengths"], zero_infinity=True), {}

    def optimizer(self, model: nn.Module, steps: int) -> Optimizer:
        """AdamW on clipped gradients; the rate climbs shortly and falls along a cosine."""
        climb = max(1, steps // 10)
        rate = Warmup(climb, Cosine(self.settings.learning_rate, steps=max(1, steps - climb)))
        return adamw(rate, weight_decay=0.01, clip_norm=1.0)

    def evaluate(self, model: nn.Module, batches: Batches) -> dict[str, float]:
        """Loss and word errors of the likeliest letters, over all and under each condition."""
        return self._measured(cast(Recognizer, model), batches, None)

    def _measured(self, model: Recognizer, batches: Batches, words: WordTree | None) -> dict[str, float]:
        losses: list[float] = []
        errors: Counter[int] = Counter()
        spoken: Counter[int] = Counter()
        for batch in batches.one_pass():
            path_BTV = log_probabilities(model, batch["features"])
            losses += [float(self.loss(lambda _: path_BTV, batch)[0])] * len(path_BTV)  # noqa: B023  (called here)
            versions = batch["version"].tolist()
            rows = zip(path_BTV, _steps(batch), _texts(model, batch), versions, strict=True)
            for path_TV, steps, said, version in rows:
                heard = model.text(decoded(path_TV[:steps], words))
                errors[version] += edit_distance(heard.split(), said.split())
                spoken[version] += len(said.split())
        each = {f"word_error_{name}": errors[n] / spoken[n] for n, name in enumerate(CONDITIONS) if spoken[n]}
        return {"loss": sum(losses) / len(losses), "word_error": errors.total() / spoken.total(), **each}

    def report(self, model: nn.Module, data: TaskData) -> str:
        """Word errors under each condition, also with the list of words, and what was heard in some noise."""
        recognizer = cast(Recognizer, model)
        words = _word_tree(recognizer, data.facts)
        ways = {"letter by letter": None, "of known words": words}
        rows = {name: self._measured(recognizer, data.test, tree) for name, tree in ways.items()}
        lines = ["word error".ljust(18) + "".join(name.rjust(8) for name in CONDITIONS)]
        for name, row in rows.items():
            lines.append(name.ljust(18) + "".join(f"{row[f'word_error_{c}']:8.1%}" for c in CONDITIONS))
        batch = next(data.test.one_pass())
        path_BTV = log_probabilities(recognizer, batch["features"])
        for row, said in enumerate(_texts(recognizer, batch)[: 2 * len(CONDITIONS)]):
            heard = recognizer.text(decoded(path_BTV[row, : _steps(batch)[row]], words))
            lines.append(f"{[*CONDITIONS][row % len(CONDITIONS)]:>6}: {said} → {heard}")
        return "\n".join(lines)

    def pictures(self, model: nn.Module, data: TaskData) -> Pictures:
        """The first test utterance under each condition, one above the other, each over what the network says."""
        batch = next(data.test.one_pass())
        path_BTV = log_probabilities(cast(Recognizer, model), batch["features"])
        count = min(len(CONDITIONS), len(path_BTV))
        rows = [_picture(batch["features"][n, : batch["frames"][n]], path_BTV[n]) for n in range(count)]
        return {"heard": torch.cat(rows, dim=1)}

    def predict(self, model: nn.Module, file: Path, facts: Facts) -> Prediction:
        """What is said in a WAV file."""
        features_FM = Features()(read_wav(file, RATE_HZ))
        room = max(self._frames(), -(-len(features_FM) // STRIDE) * STRIDE)
        padded = functional.pad(features_FM, (0, 0, 0, room - len(features_FM)))
        recognizer = cast(Recognizer, model)
        path_TV = log_probabilities(recognizer, padded[None])[0, : -(-len(features_FM) // STRIDE)]
        letters = recognizer.text(greedy(path_TV))
        words = recognizer.text(decoded(path_TV, _word_tree(recognizer, facts)))
        picture = {"heard": _picture(features_FM, path_TV)}
        return Prediction(f"{words} (letter by letter: {letters})", {"text": words, "letters": letters}, picture)


class Features:
    """Recordings [n] to log-mel features [F, M], of mean 0 and deviation 1 in each band: loudness does not count."""

    def __init__(self) -> None:
        # What is 40 dB below the speech counts as silence, so that it looks alike in all clean recordings.
        self.log_mel = LogMel(RATE_HZ, BANDS, floor=1e-4)

    def __call__(self, recording: Tensor) -> Tensor:
        if len(recording) < self.log_mel.samples:
            raise DataError(f"A recording of {len(recording)} samples is too short. Give half a second at least.")
        loud = recording.float()
        features_FM = self.log_mel(loud / loudness(loud))
        return (features_FM - features_FM.mean(0)) / (features_FM.std(0) + 0.1)


class Recognizer(nn.Module):
    """Two convolutions, of which one takes three frames to a step, an LSTM in both directions, one linear layer.

    Source: Graves, Mohamed and Hinton, "Speech recognition with deep recurrent neural networks", ICASSP 2013.
    """

    def __init__(self, letters: str, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.letters = letters
        self.hear = nn.Conv1d(BANDS, width, kernel_size=5, padding=2)
        self.shorten = nn.Conv1d(width, width, kernel_size=7, stride=STRIDE, padding=2)
        self.norm = nn.LayerNorm(width)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.readout = nn.Linear(2 * width, len(letters) + 1)

    def forward(self, features_BFM: Tensor) -> Tensor:
        """Log-probabilities [B, T, V]; F is a multiple of the stride."""
        x_BDT = functional.gelu(self.shorten(functional.gelu(self.hear(features_BFM.transpose(1, 2)))))
        x_BTD, _ = self.lstm(self.dropout(self.norm(x_BDT.transpose(1, 2))))
        return cast(Tensor, self.readout(self.dropout(x_BTD)).log_softmax(-1))

    def text(self, symbols: Iterable[int]) -> str:
        """The letters of symbols, without what is no letter (blanks, and padding)."""
        return "".join(self.letters[symbol - 1] for symbol in symbols if symbol != BLANK)


@torch.no_grad()
def log_probabilities(model: Recognizer, features_BFM: Tensor) -> Tensor:
    """What the model says, on the CPU."""
    return cast(Tensor, model(features_BFM.to(next(model.parameters()).device))).float().cpu()


def decoded(path_TV: Tensor, words: WordTree | None) -> list[int]:
    """The likeliest path's letters; or the likeliest of the words, where these are given."""
    return greedy(path_TV) if words is None else beam_search(path_TV, 16, words)


def _steps(batch: Any) -> list[int]:
    return [-(-frames // STRIDE) for frames in batch["frames"].tolist()]


def _texts(model: Recognizer, batch: Any) -> list[str]:
    return [model.text(letters) for letters in batch["letters"].tolist()]


def _word_tree(model: Recognizer, facts: Facts) -> WordTree:
    words = cast(list[str], facts["words"])
    return WordTree(
        [[model.letters.index(letter) + 1 for letter in word] for word in words], model.letters.index(" ") + 1
    )


def _picture(features_FM: Tensor, path_TV: Tensor) -> Tensor:
    """The spectrogram, low tones below, over the probabilities of the letters (the blank on top), [1, rows, F]."""
    loud = ((features_FM.T.flip(0) + 2) / 4).clamp(0, 1)
    said = path_TV.exp().repeat_interleave(STRIDE, 0)[: len(features_FM)].T
    return functional.pad(torch.cat([loud, said]), (0, 3, 0, 3), value=1.0)[None]


def _vocabulary(facts: Facts) -> CharVocabulary:
    return CharVocabulary.from_json(cast(Facts, facts["letters"]))


def _own(name: str) -> tuple[SpokenSentences, SpokenSentences, SpokenSentences]:
    """A user's sentences in three parts that share no text: about 80 %, 10 % and 10 % of the texts."""
    if Path(name).exists() or name.startswith((".", "/", "~")):
        sentences = sentence_folder(Path(name).expanduser(), RATE_HZ)
    else:
        datasets = require("datasets", extra="huggingface", package="Hugging Face's datasets")
        table = datasets.load_dataset(name, split="train").cast_column("audio", datasets.Audio(decode=False))
        sentences = sentence_table(table, RATE_HZ, name)
    texts = sorted(set(sentences.texts))
    if len(texts) < 10:
        raise DataError(
            f"{name} holds {len(texts)} different sentences, but 10 are the least to learn from and to test."
        )
    rest, test = holdout(len(texts), 0.1, _SPLIT_SEED)
    inner = holdout(len(rest), 0.1, _SPLIT_SEED)
    parts = ({texts[n] for n in part.tolist()} for part in (rest[inner.train], rest[inner.held_out], test))
    train, validation, held_out = (sentences.only(part) for part in parts)
    return train, validation, held_out


TASK = Speech

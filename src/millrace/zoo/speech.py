"""Understand spoken commands, in noise too: a bidirectional LSTM with CTC on speech that a data factory multiplies.

Shape suffixes: B utterances, F frames (10 ms), T steps of the network (30 ms), M mel bands, V letters and the blank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from millrace.data.audio import SpokenSentences, read_wav, sentence_folder, sentence_table, split_by_text
from millrace.data.batches import Batches, Json
from millrace.data.commands import spoken_commands
from millrace.data.espeak import Espeak
from millrace.data.factory import Factory, Recipe
from millrace.data.log_mel import SpeechFeatures
from millrace.data.prefetch import prefetched
from millrace.data.speech import AtDecibels, speech_batches
from millrace.data.text import CharVocabulary
from millrace.errors import DataError
from millrace.models.recognizer import Recognizer
from millrace.models.word_errors import word_errors
from millrace.optim.constructors import adamw
from millrace.optim.optimizer import Optimizer
from millrace.optim.schedule import warmup_cosine
from millrace.zoo.base import Facts, Pictures, Prediction, Task, TaskData
from millrace.zoo.extras import require
from millrace.zoo.settings import Settings, setting

RATE_HZ, BANDS, STRIDE = 8000, 40, 3  # of a telephone; mel bands; frames per step of the network
CONDITIONS = {"clean": math.inf, "20db": 20.0, "10db": 10.0, "5db": 5.0, "0db": 0.0}  # speech over noise
FEATURES = SpeechFeatures(RATE_HZ, BANDS)
_SPLIT_SEED = 0  # who and what is held out never changes, whatever the run's seed


@dataclass(frozen=True)
class SpeechSettings(Settings):
    """Defaults that learn for about six minutes: one core for the model, one for the factory."""

    steps: int | None = setting(2400, "stop after so many steps", low=1, on_resume=True)
    batch_size: int = setting(16, "utterances per step", low=1)
    evaluate_every: int | None = setting(400, "steps between evaluations", low=1, on_resume=True)
    checkpoint_every: int | None = setting(400, "steps between checkpoints", low=1, on_resume=True)
    threads: int | None = setting(1, "of the CPU to train with; the factory works on another", low=1, on_resume=True)
    data: str = setting("", "a folder of NAME.wav and NAME.txt, or the name of a Hugging Face data set")
    utterances: int = setting(1800, "clean utterances that espeak-ng makes to learn from", low=32)
    factory: bool = setting(True, "multiply the clean utterances: noise, rooms, speeds and volumes")
    copies: int = setting(10, "versions of every clean utterance that the factory makes", low=1)
    max_s: float = setting(2.7, "the longest utterance, in seconds", low=0.5)
    width: int = setting(96, "of the convolutions, and of the LSTM in each direction", low=8)
    layers: int = setting(2, "of the LSTM", low=1)
    dropout: float = setting(0.1, "share of the features left out between layers", low=0, high=0.9)
    learning_rate: float = setting(2.5e-3, "at the top of the schedule", low=0)


class Speech(Task[SpeechSettings]):
    """Batches of `millrace.data.speech`: features [B, F, M] and letters; log-probabilities [B, T, V]."""

    settings_type = SpeechSettings
    metric = "word_error"  # wrong words over words, all conditions together
    better = "min"
    monitor = "loss"
    bar = 0.2

    def data(self, facts: Facts | None = None) -> TaskData:
        """Texts and speakers of the three parts differ; the last two are heard under each condition."""
        s = self.settings
        train, validation, test = _own(s.data) if s.data else self._made()
        vocabulary = CharVocabulary.of("".join([*train.texts, *validation.texts, *test.texts]))
        self._check_lengths([*train.recordings, *validation.recordings, *test.recordings])
        words: list[Json] = [*sorted(set(" ".join(train.texts).split()))]
        facts = facts or {"letters": vocabulary.to_json(), "words": words}
        learned = Factory(train.recordings, RATE_HZ, Recipe(copies=s.copies), s.seed) if s.factory else train.recordings

        def letters(part: SpokenSentences) -> list[Tensor]:
            return [_vocabulary(facts).encode(text) + 1 for text in part.texts]

        def held_out(part: SpokenSentences) -> Batches:
            recordings = AtDecibels(
                part.recordings, RATE_HZ, [*CONDITIONS.values()], Recipe().noises, part.recordings, _SPLIT_SEED
            )
            return speech_batches(
                recordings, letters(part), FEATURES, self._frames(), batch_size=s.batch_size, shuffle=False
            )

        batches = speech_batches(
            learned, letters(train), FEATURES, self._frames(), batch_size=s.batch_size, seed=s.seed
        )
        return TaskData(prefetched(batches, 4), held_out(validation), held_out(test), facts)

    def _made(self) -> tuple[SpokenSentences, SpokenSentences, SpokenSentences]:
        loader = require("espeakng_loader", extra="zoo", package="espeakng-loader")
        espeak = Espeak(Path(loader.get_library_path()), Path(loader.get_data_path()))
        longest_s = self.settings.max_s * Recipe().speed[0]
        return spoken_commands(espeak, RATE_HZ, (self.settings.utterances, 60, 200), longest_s, _SPLIT_SEED)

    def _frames(self) -> int:
        return FEATURES.log_mel.frames(round(self.settings.max_s * RATE_HZ))

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
        return Recognizer(
            _vocabulary(facts).characters, cast(list[str], facts["words"]), BANDS, STRIDE, s.width, s.layers, s.dropout
        )

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """CTC, per letter; an utterance with more letters than steps counts 0."""
        path_TBV = model(batch["features"]).transpose(0, 1)
        steps = (batch["frames"] + STRIDE - 1) // STRIDE
        return functional.ctc_loss(path_TBV, batch["letters"], steps, batch["lengths"], zero_infinity=True), {}

    def optimizer(self, model: nn.Module, steps: int) -> Optimizer:
        """AdamW on clipped gradients; the rate climbs shortly and falls along a cosine."""
        rate = warmup_cosine(self.settings.learning_rate, steps, warmup=steps // 10)
        return adamw(rate, weight_decay=0.01, clip_norm=1.0)

    def evaluate(self, model: nn.Module, batches: Batches) -> dict[str, float]:
        """Loss, and word errors of what is heard in known words: over all conditions, and under each."""
        recognizer = cast(Recognizer, model)
        return super().evaluate(model, batches) | word_errors(recognizer, recognizer.words_of, batches, [*CONDITIONS])

    def report(self, model: nn.Module, data: TaskData) -> str:
        """Word errors under each condition, also without a list of words, and what was heard in some noise."""
        recognizer = cast(Recognizer, model)
        lines = ["word error".ljust(18) + "".join(name.rjust(8) for name in CONDITIONS)]
        for name, read in {"known words": recognizer.words_of, "letter by letter": recognizer.letters_of}.items():
            errors = word_errors(recognizer, read, data.test, [*CONDITIONS])
            lines.append(name.ljust(18) + "".join(f"{errors[f'word_error_{c}']:8.1%}" for c in CONDITIONS))
        batch = next(data.test.one_pass())
        paths = recognizer.heard(batch["features"], batch["frames"])
        for number, path_TV in enumerate(paths[: 2 * len(CONDITIONS)]):
            said, heard = recognizer.text(batch["letters"][number].tolist()), recognizer.words_of(path_TV)
            lines.append(f"{[*CONDITIONS][batch['version'][number]]:>6}: {said} → {heard}")
        return "\n".join(lines)

    def pictures(self, model: nn.Module, data: TaskData) -> Pictures:
        """The first test utterance under each condition, one above the other, each over what the network says."""
        batch, recognizer = next(data.test.one_pass()), cast(Recognizer, model)
        paths = recognizer.heard(batch["features"], batch["frames"])[: len(CONDITIONS)]
        rows = [recognizer.picture(batch["features"][n, : batch["frames"][n]], path) for n, path in enumerate(paths)]
        return {"heard": torch.cat([functional.pad(row, (0, self._frames() - row.shape[2])) for row in rows], dim=1)}

    def predict(self, model: nn.Module, file: Path, facts: Facts) -> Prediction:
        """What is said in a WAV file."""
        features_FM = FEATURES(read_wav(file, RATE_HZ))
        frames, recognizer = len(features_FM), cast(Recognizer, model)
        # As much padding as in training, where the model has learned to disregard it.
        padded = functional.pad(features_FM, (0, 0, 0, max(0, self._frames() - frames)))
        (path_TV,) = recognizer.heard(padded[None], torch.tensor([frames]))
        letters, words = recognizer.letters_of(path_TV), recognizer.words_of(path_TV)
        picture = {"heard": recognizer.picture(features_FM, path_TV)}
        return Prediction(f"{words} (letter by letter: {letters})", {"text": words, "letters": letters}, picture)


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
    return split_by_text(sentences, name, _SPLIT_SEED)


TASK = Speech

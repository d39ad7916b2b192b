"""Learn what words mean from the company they keep: skip-gram, with nearest neighbours, analogies and pictures.

Source: Mikolov et al., 2013, "Distributed representations of words and phrases and their compositionality".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from millrace.data.batches import Batch, Json
from millrace.data.cooccurrence import similarities
from millrace.data.corpus import corpus, divided
from millrace.data.planted import planted
from millrace.data.skipgram import SkipGramBatches, kept_shares
from millrace.data.sources import as_batches
from millrace.data.text_files import read_text
from millrace.data.vocabulary import WordVocabulary, words_of
from millrace.errors import DataError
from millrace.models.skipgram import SkipGram, negative_sampling, sampled_softmax
from millrace.models.vectors import analogies_right, similarity_found
from millrace.models.word_vectors import WordVectors, terms
from millrace.optim.constructors import adagrad, sgd
from millrace.optim.optimizer import Optimizer
from millrace.optim.schedule import Linear
from millrace.train.callbacks import Callback
from millrace.train.projector import ShowVectors
from millrace.zoo.base import Facts, Pictures, Prediction, Task, TaskData
from millrace.zoo.settings import Settings, setting

PLANTED = "planted"
_COMPARED = 400  # words, each of which is compared with each
_PROBES, _NEAR, _SHOWN = 8, 5, 2000  # words in the report and the picture, and in TensorBoard


@dataclass(frozen=True)
class WordsSettings(Settings):
    """Defaults that learn from Python's own texts in some twenty seconds."""

    epochs: int | None = setting(15, "passes over the text", low=1, on_resume=True)
    batch_size: int = setting(64, "blocks of words per step", low=1)
    steps_per_call: int = setting(4, "steps in one compiled call", low=1)
    threads: int | None = setting(1, "of the CPU to train with; none takes one per core", low=1, on_resume=True)
    data: str = setting(
        "", "a text file, a directory of them, a Hugging Face data set, or planted: see docs/zoo/words.md"
    )
    objective: Literal["negative_sampling", "sampled_softmax"] = setting("negative_sampling", "what is minimized")
    width: int = setting(100, "features of a word", low=1)
    window: int = setting(5, "words to either side at most; how many is drawn for each word", low=1)
    negatives: float = setting(5.0, "noise words that weigh as much as one context, in negative sampling", low=0)
    length: int = setting(32, "words of a block", low=2)
    noise: int = setting(32, "noise words that a block's words share", low=1)
    subsample: float = setting(1e-4, "frequency from which on occurrences of a word are left out; 0 keeps all", low=0)
    min_count: int = setting(5, "occurrences that a word needs", low=1)
    rule: Literal["adagrad", "sgd"] = setting("adagrad", "how rows are updated")
    learning_rate: float = setting(0.05, "of Adagrad; for sgd 0.025 for each pair; both fall to nothing", low=0)
    sentences: int = setting(30_000, "of the planted text", low=1)


class Words(Task[WordsSettings]):
    """Batches of `SkipGramBatches`; one that is held out also has pairs of words [P, 2], how alike they are there [P],
    and analogies [Q, 4]."""

    settings_type = WordsSettings
    metric = "similarity"
    bar = 0.45

    def data(self, facts: Facts | None = None) -> TaskData:
        """Of every 20,000 words of the text 4,000 are for the test and 1,000 for validation."""
        s = self.settings
        known = planted(s.sentences, s.seed) if s.data == PLANTED else None
        parts = divided([words_of(text) for text in corpus(s.data)] if known is None else known.sentences)
        vocabulary = WordVocabulary.of(parts[0], s.min_count) if facts is None else _vocabulary(facts)
        questions = [row for row in known.analogies if vocabulary.has(row)] if known else []
        rows: list[Json] = [list(row) for row in known.rows if vocabulary.has(row)] if known else []
        train, validation, test = (self._batches(part, vocabulary) for part in parts)
        return TaskData(
            train,
            as_batches([self._held_out(validation, vocabulary, questions)]),
            as_batches([self._held_out(test, vocabulary, questions)]),
            facts={"vocabulary": vocabulary.to_json(), "rows": rows},
        )

    def _batches(self, sentences: Sequence[Sequence[str]], vocabulary: WordVocabulary) -> SkipGramBatches:
        s = self.settings
        return SkipGramBatches(
            *vocabulary.encode(sentences),
            vocabulary.counts,
            batch_size=s.batch_size,
            length=s.length,
            window=s.window,
            noise=s.noise,
            threshold=s.subsample,
            seed=s.seed,
        )

    def _held_out(self, text: SkipGramBatches, vocabulary: WordVocabulary, questions: Iterable[Sequence[str]]) -> Batch:
        """One batch of all, and which words are alike in it."""
        blocks = list(text.one_pass())
        batch = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
        pairs, alike = similarities(
            text.words, text.sentences, len(vocabulary), window=self.settings.window, most=_COMPARED
        )
        found = [vocabulary.numbers(row) for row in questions]
        batch |= {"pairs": torch.from_numpy(pairs), "alike": torch.from_numpy(alike)}
        return batch | ({"analogies": torch.tensor(found)} if found else {})

    def model(self, facts: Facts) -> nn.Module:
        """A vector for every word, and another for it as a context."""
        return SkipGram(_vocabulary(facts).counts, self.settings.width)

    def loss(self, model: SkipGram, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over running words; on held-out text also how well the vectors rank pairs and solve analogies."""
        if self.settings.objective == "sampled_softmax":
            loss = sampled_softmax(model, batch)
        else:
            loss = negative_sampling(model, batch, self.settings.negatives)
        metrics = {}
        if "pairs" in batch:
            metrics["similarity"] = similarity_found(model.words.weight, batch["pairs"], batch["alike"])
        if "analogies" in batch:
            metrics["analogies"] = analogies_right(model.words.weight, batch["analogies"])
        return loss, metrics

    def optimizer(self, model: nn.Module, steps: int) -> Optimizer:
        """Rules that leave rows alone which a batch does not name, so that rows are all that need travel."""
        s = self.settings
        if s.rule == "adagrad":
            return adagrad(Linear(s.learning_rate, steps=steps, end=s.learning_rate / 20))
        rate = s.learning_rate * s.batch_size * s.length  # the loss is a mean over so many words
        return sgd(Linear(rate, steps=steps, end=rate / 100))

    def callbacks(self, model: nn.Module, data: TaskData) -> Iterable[Callback]:
        """TensorBoard's projector shows the vectors."""
        assert isinstance(model, SkipGram)
        return [ShowVectors("words", lambda: model.words.weight, _vocabulary(data.facts).words, _SHOWN)]

    def report(self, model: nn.Module, data: TaskData) -> str:
        """The neighbours of some words."""
        vectors = _vectors(model, data.facts)
        rows = [[word, *_words(vectors.near(word, _NEAR))] for word in self._probes(data.facts)]
        return "nearest words:\n" + "\n".join(f"  {word}: {', '.join(near)}" for word, *near in rows)

    def pictures(self, model: nn.Module, data: TaskData) -> Pictures:
        """Words with their neighbours, or planted ones with their forms, along their two principal components."""
        vectors = _vectors(model, data.facts)
        rows = [row for row in cast(list[list[str]], data.facts["rows"]) if len(row) == 3][:_PROBES]
        rows = rows or [[word, *_words(vectors.near(word, _NEAR))] for word in self._probes(data.facts)]
        return {"words": vectors.drawn(rows)}

    def _probes(self, facts: Facts) -> list[str]:
        """Some frequent words, but none so frequent that subsampling leaves most of its occurrences out."""
        vocabulary = _vocabulary(facts)
        if rows := cast(list[list[str]], facts["rows"]):
            return [row[0] for row in rows[:: max(1, len(rows) // _PROBES)]][:_PROBES]
        kept = kept_shares(vocabulary.counts, self.settings.subsample) > 0.5
        frequent = [word for word, stays in zip(vocabulary.words, kept, strict=True) if stays and len(word) > 3]
        return (frequent or list(vocabulary.words))[: _PROBES * 4 : 4]

    def predict(self, model: nn.Module, file: Path, facts: Facts) -> Prediction:
        """For each line of a file, a word or a sum such as "hotter - hot + big", the words that come nearest."""
        lines = [line.strip() for line in read_text(file, "Give lines of words.").splitlines() if line.strip()]
        if not lines:
            raise DataError(f"The file {file} is empty: put a word in each line, or a sum such as hotter - hot + big.")
        vectors = _vectors(model, facts)
        near = {line: vectors.near(line, _NEAR) for line in lines}
        shown = (f"{line}: {', '.join(f'{word} {cosine:.2f}' for word, cosine in near[line])}" for line in near)
        picture = vectors.drawn([[*terms(line), *_words(found)] for line, found in near.items()])
        nearest: dict[str, Json] = {line: list(_words(found)) for line, found in near.items()}
        return Prediction("\n".join(shown), {"nearest": nearest}, {"words": picture})


def _vocabulary(facts: Facts) -> WordVocabulary:
    return WordVocabulary.from_json(cast(Facts, facts["vocabulary"]))


def _vectors(model: nn.Module, facts: Facts) -> WordVectors:
    assert isinstance(model, SkipGram)
    return WordVectors(_vocabulary(facts), model.words.weight.detach().cpu())


def _words(near: Sequence[tuple[str, float]]) -> list[str]:
    return [word for word, _ in near]


TASK = Words

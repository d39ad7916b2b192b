"""python -m bench.words: skip-gram against gensim: words per second, and how good the vectors are after equal reading.

Both learn from the default text of the task `words` (its training part), with the same vocabulary, features, window,
noise words for a context, and subsampling, on as many threads. gensim gets sentences as lists of words, and millrace
reads its batches and takes whole steps by `fit`, compiled before the clock starts. They take turns; a turn is some
epochs. Then both learn for the task's epochs, and their vectors are compared with the held-out text. Prints JSON lines:
words per second, and per second of processor time, which says more where other programs have the cores at times. (Two
threads of one step wait for each other, and so for any other program; then `--threads 1` is the fair comparison.)
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat, cast

import numpy as np
import torch
from gensim.models import Word2Vec

from millrace.data.skipgram import SkipGramBatches
from millrace.models.vectors import similarity_found
from millrace.train.callbacks import Callback, RunView
from millrace.train.fit import fit
from millrace.zoo.base import TaskData
from millrace.zoo.words import Words, WordsSettings


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure."""
    options = argparse.ArgumentParser(prog="python -m bench.words", description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--epochs", type=int, default=3, help="of a turn")
    options.add_argument("--threads", type=int, default=2, help="of each")
    options.add_argument("--seeds", type=int, default=3, help="for the quality")
    given = options.parse_args(arguments)
    torch.set_num_threads(given.threads)
    data = Words(WordsSettings()).data()
    text = sentences_of(data)
    rates: dict[str, list[Rate]] = {"millrace": [], "gensim": []}
    for _ in range(given.rounds):
        rates["millrace"].append(millrace_run(WordsSettings(), data, given.epochs)[0])
        rates["gensim"].append(gensim_run(WordsSettings(), data, text, given.epochs, given.threads)[0])
    for kind in ("per_s", "per_cpu_s"):
        ours, theirs = ([getattr(rate, kind) for rate in found] for found in rates.values())
        for name, found in (("millrace", ours), ("gensim", theirs)):
            figure = {"median": round(statistics.median(found)), "best": round(max(found)), "threads": given.threads}
            print(json.dumps({"name": f"words/{name}/words_{kind}", **figure}))
        ratio = statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
        shown = {"ratio": round(ratio, 2), "of_bests": round(max(ours) / max(theirs), 2), "rounds": given.rounds}
        print(json.dumps({"name": f"words/millrace over gensim/{kind}", **shown}), flush=True)
    quality: dict[str, list[float]] = {"millrace": [], "gensim": []}
    for seed in range(given.seeds):
        settings = WordsSettings(seed=seed)
        epochs = settings.epochs or 1
        quality["millrace"].append(similarity(millrace_run(settings, Words(settings).data(), epochs)[1], data))
        quality["gensim"].append(similarity(gensim_run(settings, data, text, epochs, given.threads)[1], data))
    for name, found in quality.items():
        print(json.dumps({"name": f"words/{name}", "similarity": [round(value, 4) for value in found]}), flush=True)


@dataclass(frozen=True)
class Rate:
    """Running words per second, and per second of processor time."""

    per_s: float
    per_cpu_s: float


def sentences_of(data: TaskData) -> list[list[str]]:
    """The training text as gensim takes it; words are named by their numbers."""
    train = cast(SkipGramBatches, data.train)
    words, sentences = train.words, train.sentences
    ends = np.flatnonzero(np.diff(sentences)) + 1
    return [[str(word) for word in part] for part in np.split(words, ends)]


def now() -> tuple[float, float]:
    """Seconds by the clock, and of the processor."""
    return time.perf_counter(), time.process_time()


def rate_between(begin: tuple[float, float], end: tuple[float, float], words: float) -> Rate:
    """For so many words in that time."""
    return Rate(words / (end[0] - begin[0]), words / (end[1] - begin[1]))


class _Clock(Callback):
    """When the first step was over, and the last."""

    def __init__(self) -> None:
        self.times_s: list[tuple[float, float]] = []

    def on_step(self, run: RunView, step: int, values: Mapping[str, SupportsFloat]) -> None:
        self.times_s.append(now())


def millrace_run(settings: WordsSettings, data: TaskData, epochs: int) -> tuple[Rate, torch.Tensor]:
    """Running words per second after the first call of several steps, and the vectors."""
    task, clock = Words(settings), _Clock()
    torch.manual_seed(settings.seed)
    model = task.model(data.facts)
    steps = epochs * (data.train.batches_per_epoch or 1)
    fit(
        model,
        data.train,
        loss=task.loss,
        optimizer=task.optimizer(model, steps),
        steps=steps,
        steps_per_call=settings.steps_per_call,
        seed=settings.seed,
        callbacks=[clock],
        compile="inductor",
        run_dir=False,
        progress=False,
    )
    first = 1 + settings.steps_per_call  # the first step goes alone, and each of the two calls is compiled
    words = len(cast(SkipGramBatches, data.train).words) * epochs * (steps - first) / steps
    return rate_between(clock.times_s[first - 1], clock.times_s[-1], words), model.words.weight.detach()


def gensim_run(
    settings: WordsSettings, data: TaskData, text: list[list[str]], epochs: int, threads: int
) -> tuple[Rate, torch.Tensor]:
    """Running words per second, and the vectors."""
    model = Word2Vec(
        vector_size=settings.width,
        window=settings.window,
        negative=round(settings.negatives),
        sample=settings.subsample,
        sg=1,
        min_count=1,
        workers=threads,
        seed=settings.seed + 1,
    )
    model.build_vocab(text)
    begin = now()
    model.train(text, total_examples=len(text), epochs=epochs)
    rate = rate_between(begin, now(), sum(map(len, text)) * epochs)
    vocabulary: Any = data.facts["vocabulary"]
    vectors = np.zeros((len(vocabulary["words"]), settings.width), np.float32)
    for number, word in enumerate(model.wv.index_to_key):
        vectors[int(word)] = model.wv.vectors[number]
    return rate, torch.from_numpy(vectors)


def similarity(vectors: torch.Tensor, data: TaskData) -> float:
    """With the test text."""
    (batch,) = data.test.one_pass()
    return float(similarity_found(vectors, batch["pairs"], batch["alike"]))


if __name__ == "__main__":
    main()

"""Translate the messages of programs: an LSTM encoder-decoder with attention, or a transformer.

Learns from the translation catalogues of whatever is installed, or from pairs of one's own.

Source: Wu et al., "Google's neural machine translation system", 2016; Vaswani et al., "Attention is all you need",
2017.

Shape suffixes: B sentences, S subwords of a source, T of a target, V in the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from torch import Tensor, nn

from millrace.data.batches import Batches
from millrace.data.catalogues import Pair
from millrace.data.pairs import PairBatches, TokenPair, buckets_for
from millrace.data.parallel_text import read_pairs, read_sentences, reversals, split_by_message
from millrace.data.placeholders import MARKS, masked, readable, restored
from millrace.data.subwords import END, START, Subwords
from millrace.errors import DataError
from millrace.models.encoder_decoder import EncoderDecoder, sequence_loss, shifted, token_accuracy
from millrace.models.lstm_encoder_decoder import LstmEncoderDecoder
from millrace.models.nearest_texts import nearest_texts
from millrace.models.transformer_encoder_decoder import TransformerEncoderDecoder
from millrace.models.translator import Translator
from millrace.optim.constructors import adamw
from millrace.optim.optimizer import Optimizer
from millrace.optim.schedule import warmup_cosine
from millrace.zoo.base import Facts, Pictures, Prediction, Task, TaskData
from millrace.zoo.extras import require
from millrace.zoo.settings import Settings, setting

_MADE_UP = 60_000  # pairs of the made-up language
_SEARCHED = 64  # sentences that are translated at a time
_SHOWN = 5  # translations in the report, and pictures


@dataclass(frozen=True)
class TranslateSettings(Settings):
    """Defaults that translate short messages after about five minutes on one core."""

    steps: int | None = setting(1200, "stop after so many steps", low=1, on_resume=True)
    batch_size: int = setting(64, "sentence pairs per step", low=1)
    evaluate_every: int | None = setting(250, "steps between evaluations", low=1, on_resume=True)
    checkpoint_every: int | None = setting(250, "steps between checkpoints", low=1, on_resume=True)
    threads: int | None = setting(1, "of the CPU to train with; none takes one per core", low=1, on_resume=True)
    data: str = setting(
        "", "pairs of one's own: .mo, .po, .tsv, a directory of catalogues, a Hugging Face data set; or reversal"
    )
    language: str = setting("fr", "to translate into, from English")
    longest: int = setting(24, "subwords of a sentence at most, or of a translation", low=1)
    pieces: int = setting(4000, "subwords at most, in a vocabulary that both languages share", low=300)
    kind: Literal["lstm", "transformer"] = setting("lstm", "of encoder and decoder")
    width: int = setting(192, "features of every layer", low=2)
    layers: int = setting(2, "of the encoder, and of the decoder", low=2)
    heads: int = setting(4, "of a transformer's attention; they must divide the width", low=1)
    dropout: float = setting(0.1, "share left out before every layer", low=0, high=0.9)
    label_smoothing: float = setting(0.1, "share of the target spread over all subwords", low=0, high=0.9)
    learning_rate: float = setting(3e-3, "at the top of the schedule", low=0)
    weight_decay: float = setting(0.05, "decoupled", low=0)
    beam: int = setting(4, "hypotheses of the search", low=1, on_resume=True)
    length_penalty: float = setting(0.6, "alpha of Wu et al.: more favours the long", low=0, on_resume=True)
    coverage_penalty: float = setting(0.2, "beta: more wants the whole source looked at", low=0, on_resume=True)


class Translate(Task[TranslateSettings]):
    """Batches {"source": [B, S], "target": [B, T]} of subwords, padded; the target ends with END."""

    settings_type = TranslateSettings
    metric = "bleu"
    monitor = "loss"  # BLEU takes a search
    bar = 30.0
    _subwords: Subwords

    def data(self, facts: Facts | None = None) -> TaskData:
        """Sentence pairs in parts that share no message."""
        s = self.settings
        pairs = reversals(_MADE_UP, s.longest) if s.data == "reversal" else read_pairs(s.data, s.language)
        parts = split_by_message(pairs)
        learned = (text for pair in parts[0] for text in pair)
        self._subwords = Subwords.of(learned, s.pieces, MARKS) if facts is None else _subwords(facts)
        train, validation, test = map(self._tokens, parts)
        if not (train and validation and test):
            raise DataError(
                f"There are {len(pairs)} sentence pairs, and {len(train)} to learn from that have at most "
                f"longest={s.longest} subwords on either side: too few to hold some out for tests. Give more."
            )
        buckets = buckets_for([*train, *validation, *test])
        size = min(s.batch_size, len(validation))
        return TaskData(
            PairBatches(train, s.batch_size, buckets, s.seed),
            PairBatches(validation[: len(validation) // size * size], size, buckets[-1:]),  # one graph serves all
            PairBatches(test, min(_SEARCHED, len(test)), buckets[-1:]),
            facts={"subwords": self._subwords.to_json()},
        )

    def _tokens(self, pairs: list[Pair]) -> list[TokenPair]:
        """Those that are not too long; both sides end with END."""
        sources, targets = (self._subwords.encode_all([pair[side] for pair in pairs]) for side in (0, 1))
        both = zip(sources, targets, strict=True)
        return [([*s, END], [*t, END]) for s, t in both if max(len(s), len(t)) <= self.settings.longest]

    def model(self, facts: Facts) -> EncoderDecoder:
        """As wide and deep as the settings say."""
        s, size = self.settings, len(_subwords(facts))
        if s.kind == "transformer":
            return TransformerEncoderDecoder(size, size, s.width, s.layers, s.heads, s.dropout)
        return LstmEncoderDecoder(size, size, s.width, s.layers, s.dropout)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the next subword, after the right ones; smoothed in training only."""
        logits_BTV = model(batch["source"], shifted(batch["target"], START))
        smoothing = self.settings.label_smoothing if model.training else 0.0
        loss = sequence_loss(logits_BTV, batch["target"], smoothing)
        return loss, {"token_accuracy": token_accuracy(logits_BTV, batch["target"])}

    def optimizer(self, model: nn.Module, steps: int) -> Optimizer:
        """AdamW on clipped gradients; the rate climbs over a tenth of the run and falls along a cosine."""
        s = self.settings
        rate = warmup_cosine(s.learning_rate, steps, warmup=steps // 10, end=s.learning_rate / 20)
        return adamw(rate, betas=(0.9, 0.98), weight_decay=s.weight_decay, clip_norm=1.0)

    def evaluate(self, model: nn.Module, batches: Batches) -> dict[str, float]:
        """Loss, BLEU (0 to 100), the share of translations that are the reference, and BLEU of copying the source."""
        sources, references, said = self._translator(model).translated(batches)
        return {
            **super().evaluate(model, batches),
            "bleu": bleu(said, references),
            "exact": sum(a == b for a, b in zip(said, references, strict=True)) / len(said),
            "bleu_of_copy": bleu(sources, references),
        }

    def _translator(self, model: nn.Module) -> Translator:
        s = self.settings
        return Translator(cast(EncoderDecoder, model), self._subwords, s.beam, s.length_penalty, s.coverage_penalty)

    def report(self, model: nn.Module, data: TaskData) -> str:
        """BLEU of the two baselines, and some translations."""
        train, test = cast(PairBatches, data.train), cast(PairBatches, data.test)
        learned, asked = ([tuple(map(self._subwords.decode, pair)) for pair in part.pairs] for part in (train, test))
        sources, references = zip(*asked, strict=True)
        nearest = [learned[number][1] for number in nearest_texts(sources, [source for source, _ in learned])]
        lines = [
            f"BLEU of copying the source: {bleu(list(sources), list(references)):.1f}",
            f"BLEU of the nearest training source's translation: {bleu(nearest, list(references)):.1f}",
        ]
        translator = self._translator(model)
        for source, reference in asked[:: max(1, len(asked) // _SHOWN)]:
            said = translator.text(translator.best(translator.source(source))[0])
            lines += ["", f"  {source}", f"  → {said}", f"  ({reference})"]
        return readable("\n".join(lines))

    def pictures(self, model: nn.Module, data: TaskData) -> Pictures:
        """Where the model looked while it translated some of the test sentences."""
        source_BS = next(data.test.one_pass())["source"][:_SHOWN]
        translator = self._translator(model)
        found = zip(source_BS, translator.best(source_BS), strict=True)
        return {f"attention_{n}": translator.picture(row, best) for n, (row, best) in enumerate(found)}

    def predict(self, model: nn.Module, file: Path, facts: Facts) -> Prediction:
        """The translation of every line of a text, and where the model looked for the first."""
        self._subwords = _subwords(facts)
        translator = self._translator(model)
        said: list[str] = []
        pictures: dict[str, Tensor] = {}
        longest = 0
        for line in read_sentences(file):
            marked = masked(line)
            if marked is None:
                raise DataError(f"This line of {file} has more than {len(MARKS)} placeholders: {line[:60]!r}. Cut it.")
            source_1S = translator.source(marked[0])
            longest = max(longest, source_1S.shape[1] - 1)
            best = translator.best(source_1S)[0]
            said.append(restored(translator.text(best), marked[1]))
            pictures = pictures or {"attention": translator.picture(source_1S[0], best)}
        text = "\n".join(said)
        if longest > self.settings.longest:
            text += f"\n(a line has {longest} subwords; the model learned from at most {self.settings.longest})"
        return Prediction(text, {"translations": list(said)}, pictures)


def bleu(said: list[str], references: list[str]) -> float:
    """Corpus BLEU, 0 to 100, as sacrebleu measures it. Source: Post, "A call for clarity in reporting BLEU", 2018."""
    return float(require("sacrebleu", extra="zoo", package="sacrebleu").corpus_bleu(said, [references]).score)


def _subwords(facts: Facts) -> Subwords:
    return Subwords.from_json(cast(Facts, facts["subwords"]))


TASK = Translate

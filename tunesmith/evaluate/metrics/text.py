"""Free text against a reference: ROUGE (rouge-score), BLEU and chrF (sacrebleu), METEOR (NLTK), WER and CER (jiwer)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from tunesmith.errors import MachineError
from tunesmith.evaluate.metrics.base import Answers, Floats, Metric, mean, rows


def _rouge(kind: str) -> Callable[[Answers], Floats]:
    def stats(answers: Answers) -> Floats:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind], use_stemmer=False)
        pairs = zip(answers.given, answers.references, strict=True)
        return rows([scorer.score(reference, given)[kind].fmeasure for given, reference in pairs])

    return stats


def _chrf_stats(answers: Answers) -> Floats:
    """For each n-gram order: n-grams in the answer, in the reference, and in both (Popović 2015)."""
    from sacrebleu.metrics import CHRF

    stats = CHRF()._extract_corpus_statistics(list(answers.given), [list(answers.references)])
    return np.asarray(stats, dtype=np.float64)


def _chrf(sums: Floats) -> Floats:
    """chrF2 in percent, as sacrebleu computes it: precision and recall are averaged over the orders."""
    given, reference, both = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 3), -1, 0)
    counted = (given > 0) & (reference > 0)
    orders = np.maximum(counted.sum(-1), 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(counted, both / given, 0.0).sum(-1) / orders
        recall = np.where(counted, both / reference, 0.0).sum(-1) / orders
        score = 5 * precision * recall / (4 * precision + recall)
    return np.asarray(100 * np.nan_to_num(score))


def _bleu_stats(answers: Answers) -> Floats:
    """Lengths of answer and reference, then for each order matching and all n-grams (Papineni et al. 2002)."""
    from sacrebleu.metrics import BLEU

    stats = BLEU()._extract_corpus_statistics(list(answers.given), [list(answers.references)])
    return np.asarray(stats, dtype=np.float64)


def _bleu(sums: Floats) -> Floats:
    """BLEU in percent as sacrebleu computes it by default: exponential smoothing, no effective order."""
    given, reference = sums[..., 0], sums[..., 1]
    hits, all_of = sums[..., 2:6], sums[..., 6:10]
    with np.errstate(invalid="ignore", divide="ignore"):
        halvings = np.cumsum((hits == 0) & (all_of > 0), axis=-1)
        precision = np.where(hits == 0, 100.0 / (2.0**halvings * all_of), 100.0 * hits / all_of)
        short = np.where(given < reference, np.exp(1 - reference / given), 1.0)
        score = short * np.exp(np.log(precision).mean(-1))
    # An order without any n-gram, or no matching word at all, is a score of 0.
    return np.asarray(np.where((all_of > 0).all(-1) & (hits[..., 0] > 0), np.nan_to_num(score), 0.0))


def signature(name: str) -> Callable[[Answers], dict[str, Any]]:
    """sacrebleu's signature of a score: what it has to be told with."""

    def told(answers: Answers) -> dict[str, Any]:
        from sacrebleu.metrics import BLEU, CHRF

        metric = {"bleu": BLEU, "chrf": CHRF}[name]()
        metric.corpus_score(["a"], [["a"]])
        return {"signature": str(metric.get_signature())}

    return told


@cache
def _stemmer() -> Any:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


class _NoSynonyms:
    """In place of WordNet, a download that NLTK makes by itself."""

    def synsets(self, word: str) -> list[Any]:
        return []


def _meteor(answers: Answers) -> Floats:
    """NLTK's METEOR (Banerjee and Lavie 2005) on exact and stemmed words; WordNet's synonyms are left out."""
    from nltk.translate.meteor_score import single_meteor_score

    pairs = zip(answers.given, answers.references, strict=True)
    scores = [
        single_meteor_score(r.split(), g.split(), stemmer=_stemmer(), wordnet=_NoSynonyms()) if g.strip() else 0.0
        for g, r in pairs
    ]
    return rows(scores)


def _errors(unit: str) -> Callable[[Answers], Floats]:
    """Insertions, deletions and substitutions, and the reference's length, in words or characters."""

    def stats(answers: Answers) -> Floats:
        try:
            import jiwer
        except ImportError as error:
            raise MachineError(
                f"the {unit} error rate needs the package jiwer",
                where="evaluate.metrics",
                fix="Install it: pip install 'tunesmith[metrics]'",
            ) from error
        process = jiwer.process_words if unit == "word" else jiwer.process_characters
        found = []
        for given, reference in zip(answers.given, answers.references, strict=True):
            out = process(reference, given)
            found.append(
                [out.substitutions + out.deletions + out.insertions, out.hits + out.substitutions + out.deletions]
            )
        return np.asarray(found, dtype=np.float64)

    return stats


rouge_1 = Metric("rouge_1", _rouge("rouge1"), mean)
rouge_2 = Metric("rouge_2", _rouge("rouge2"), mean)
rouge_l = Metric("rouge_l", _rouge("rougeL"), mean)
chrf = Metric("chrf", _chrf_stats, _chrf, details=signature("chrf"))
bleu = Metric("bleu", _bleu_stats, _bleu, details=signature("bleu"))
meteor = Metric("meteor", _meteor, mean)
wer = Metric("wer", _errors("word"), mean, higher_is_better=False)
cer = Metric("cer", _errors("character"), mean, higher_is_better=False)

"""What the tuned model gets wrong: by kind, by what the rows are about, where the baseline did better, and which labels
may be wrong themselves. Of rows as answers.jsonl has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tunesmith.evaluate.metrics.base import parse, same
from tunesmith.intervals import share

Line = Mapping[str, Any]
UNLIKELY = 2.0  # nats a token
KINDS, LISTED, EXAMPLES, SHOWN = 12, 50, 12, 3
FEWEST_ROWS, FEWEST_MISSES, MOST_CLUSTERS, TERMS, DIMENSIONS = 20, 5, 12, 4, 50


def mistakes(
    lines: Sequence[Line], kind: str, higher: bool, seed: int, embedding: tuple[str, Any] | None = None
) -> dict[str, Any]:
    """As scorecards hold it; rows by their ids, those where the baseline did better first. `embedding`: the name of
    the model that embedded what the rows are about, and the vectors [n, D].

    A miss is an answer that is wrong; where answers are neither right nor wrong, one that scores worse than the
    baseline's.
    """
    worse = [line for line in lines if gain(line, higher) < 0]
    ids = {line["id"] for line in worse}
    missed = sorted(misses(lines, kind, higher), key=lambda line: gain(line, higher))
    return {
        "misses": len(missed),
        "worse": {"n": len(worse), "rows": [x["id"] for x in sorted(worse, key=lambda x: gain(x, higher))[:LISTED]]},
        "kinds": by_kind(missed, lines, kind),
        "clusters": by_cluster(lines, {line["id"] for line in missed}, ids, seed, embedding and embedding[1]),
        "embedding": embedding and embedding[0],
        "suspects": [line["id"] for line in suspects(lines, kind)],
    }


def gain(line: Line, higher: bool) -> float:
    """By how much tuning made a row's score better; equality with the reference where a row has no score."""
    one, other = (
        float(same(line[side]["answer"], line["reference"])) if line[side]["score"] is None else line[side]["score"]
        for side in ("baseline", "tuned")
    )
    unscored = any(line[side]["score"] is None for side in ("baseline", "tuned"))
    return other - one if higher or unscored else one - other


def misses(lines: Sequence[Line], kind: str, higher: bool) -> list[Line]:
    """The rows whose answer by the tuned model counts as wrong."""
    scores = {line["tuned"]["score"] for line in lines}
    if kind in ("label", "json") or scores <= {None}:
        return [line for line in lines if not same(line["tuned"]["answer"], line["reference"])]
    if scores <= {0.0, 1.0} and higher:
        return [line for line in lines if line["tuned"]["score"] == 0.0]
    return [line for line in lines if gain(line, higher) < 0]


def by_kind(missed: Sequence[Line], lines: Sequence[Line], kind: str) -> list[dict[str, Any]]:
    """What went wrong, most first: {name, n, rows}."""
    labels = {line["reference"].strip() for line in lines}
    groups: dict[str, list[str]] = {}
    for line in missed:
        name = _miss(line["tuned"]["answer"].strip(), line["reference"].strip(), kind, labels)
        groups.setdefault(name, []).append(line["id"])
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))[:KINDS]
    return [{"name": name, "n": len(found), "rows": found[:SHOWN]} for name, found in ordered]


def _miss(given: str, right: str, kind: str, labels: set[str]) -> str:
    if not given:
        return "no answer"
    if kind == "label":
        return f"{right} taken for {given}" if given in labels else "an answer that is no label"
    if kind == "json":
        found, wanted = parse(given), parse(right) or {}
        if found is None:
            return "not JSON"
        wrong = sorted(key for key in wanted.keys() | found.keys() if found.get(key) != wanted.get(key))
        return "wrong: " + ", ".join(wrong[:3])
    if given in right or right in given:
        return "a part of the reference, or more than it"
    ratio = len(given) / max(len(right), 1)
    return "much shorter" if ratio < 0.5 else "much longer" if ratio > 2 else "other words"


def about(prompt: Sequence[Any], reference: str) -> str:
    """What a row is about: the last that was asked, or the text itself where nothing was."""
    if not prompt:
        return reference
    last = prompt[-1]
    return str(last["content"] if isinstance(last, Mapping) else last.content)


def by_cluster(
    lines: Sequence[Line], missed: set[str], worse: set[str], seed: int, embedded: Any = None
) -> list[dict[str, Any]]:
    """Misses by what the rows are about: {about, n, misses, share with its interval, rows}, largest share first.

    Rows are clustered (k-means) by their embeddings, or by their prompts' TF-IDF vectors where there are none (latent
    semantic analysis, Deerwester et al. 1990), in at most 50 dimensions; named by the words that set a cluster apart.
    """
    if len(lines) < FEWEST_ROWS or len(missed) < FEWEST_MISSES:
        return []
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA, TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    texts = [about(line["prompt"], line["reference"]) for line in lines]
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2, max_df=0.8, token_pattern=r"(?u)\b[^\W\d_]\w+\b")
    try:
        weights = vectorizer.fit_transform(texts)
    except ValueError:  # no word is in two rows and not in most
        weights = None
    if weights is None and embedded is None:
        return []
    if embedded is not None:  # about their mean, since a language model's states all point one way (Ethayarajh 2019)
        whole = normalize(np.asarray(embedded, np.float64))
        vectors = normalize(PCA(min(DIMENSIONS, *whole.shape), random_state=seed).fit_transform(whole))
    else:
        width = min(DIMENSIONS, weights.shape[1] - 1)
        vectors = (
            normalize(TruncatedSVD(width, random_state=seed).fit_transform(weights)) if width > 1 else weights.toarray()
        )
    k = int(np.clip(round(np.sqrt(len(lines) / 2)), 2, MOST_CLUSTERS))
    places = KMeans(min(k, len(np.unique(vectors.round(6), axis=0))), n_init=4, random_state=seed).fit_predict(vectors)
    words = [] if weights is None else vectorizer.get_feature_names_out()
    found = []
    for number in sorted(set(places.tolist())):
        members = [line for line, place in zip(lines, places, strict=True) if place == number]
        wrong = [line["id"] for line in members if line["id"] in missed]
        if not wrong:
            continue
        apart: Any = [] if weights is None else np.asarray(weights[places == number].mean(0) - weights.mean(0)).ravel()
        named = ", ".join(words[i] for i in np.argsort(apart)[::-1][:TERMS] if apart[i] > 0)
        part = {"value": len(wrong) / len(members)} | share(len(wrong), len(members))
        rows = sorted(wrong, key=lambda row: row not in worse)[:SHOWN]
        told = {"about": named or "other", "n": len(members), "misses": len(wrong), "share": part, "rows": rows}
        found.append(told)
    return sorted(found, key=lambda part: -part["share"]["value"])


def suspects(lines: Sequence[Line], kind: str) -> list[Line]:
    """Rows whose label may be wrong itself: the tuned model gives another label, and finds the row's unlikely."""
    labels = {line["reference"].strip() for line in lines}
    found = []
    for line in lines if kind == "label" else ():
        given, told = line["tuned"]["answer"].strip(), line["tuned"]
        sure = told["nll"] is not None and told["nll"] / max(told["tokens"], 1) > UNLIKELY
        if given in labels and given != line["reference"].strip() and sure:
            found.append(line)
    return sorted(found, key=lambda line: -line["tuned"]["nll"] / max(line["tuned"]["tokens"], 1))[:EXAMPLES]

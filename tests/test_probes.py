"""What probes make of answers and likelihoods that are known: their values, counted by hand."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_tokenizer
from tunesmith.conversation.message import Conversation, Message
from tunesmith.conversation.render import Renderer
from tunesmith.evaluate.bias import Bias
from tunesmith.evaluate.memory import Memory
from tunesmith.evaluate.probes import Alone
from tunesmith.evaluate.safety import Safety
from tunesmith.evaluate.section import BiasSection, SafetySection
from tunesmith.inference.engine import Score
from tunesmith.inference.kept import Kept
from tunesmith.inference.subject import Continuation, Local, Reply

SIDES = ("baseline", "tuned")


class Scripted:
    """Answers and likelihoods as two functions give them."""

    name = "scripted"

    def __init__(self, answer: Callable[[str], Reply], nll: Callable[[Any], float] = lambda row: 1.0) -> None:
        self.answer, self.nll = answer, nll

    def answers(self, prompts: Any, limit: int, sampling: Any, tick: Any) -> Iterator[tuple[int, Reply]]:
        yield from ((i, self.answer(prompt.messages[-1].content)) for i, prompt in enumerate(prompts))

    def likelihoods(self, rows: Any, tick: Any) -> Iterator[tuple[int, Score]]:
        yield from ((i, Score(self.nll(row), 4)) for i, row in enumerate(rows))


def told(probe: Any, folder: Path, baseline: Any, tuned: Any) -> dict[str, Any]:
    """What a probe says of two subjects."""
    opened = {"baseline": baseline, "tuned": tuned}
    found = {
        side: probe.ask(Kept(folder / f"{side}.jsonl", side, lambda side=side: opened[side], len), side, None)  # type: ignore[misc]
        for side in SIDES
    }
    return probe.compare(found)[probe.name]  # type: ignore[no-any-return]


def values(score: dict[str, Any]) -> tuple[float, float]:
    return score["baseline"]["value"], score["tuned"]["value"]


def row(asked: str, answer: str) -> Conversation:
    return Conversation((Message("user", asked), Message("assistant", answer)), f"t.jsonl:{asked}")


def test_tokens_a_second_are_all_tokens_by_all_seconds(tmp_path: Path) -> None:
    """Not the mean of each answer's speed; and the share of answers that batches change is counted beside it."""
    lengths = {"a": (10, 1.0), "b": (10, 4.0), "c": (40, 5.0)}
    rows = [row(name, "x") for name in lengths]
    slow = Scripted(lambda asked: Reply(asked, lengths[asked][0], 2 * lengths[asked][1]))
    fast = Scripted(lambda asked: Reply(asked, *lengths[asked]))
    speed = told(Alone(rows, 8, 100, 7), tmp_path, slow, fast)
    assert values(speed["tokens_per_second"]) == (60 / 20, 60 / 10) and speed["tokens_per_second"]["n"] == 3
    assert speed["tokens_per_second"]["difference"]["value"] == 3
    assert values(speed["p50"]) == (8.0, 4.0) and values(speed["changed_by_batching"]) == (0, 0)


def test_answers_that_batches_change_are_counted(tmp_path: Path) -> None:
    class Crowded(Scripted):
        """Answers one of three otherwise where it is not asked alone."""

        def answers(self, prompts: Any, limit: int, sampling: Any, tick: Any) -> Iterator[tuple[int, Reply]]:
            for i, reply in super().answers(prompts, limit, sampling, tick):
                yield i, Reply("c, or so") if reply.text == "c" and len(prompts) > 1 else reply

    def said(asked: str) -> Reply:
        return Reply(asked, 1, 1.0)

    latency = told(Alone([row(x, "x") for x in "abc"], 8, 100, 7), tmp_path, Scripted(said), Crowded(said))
    assert values(latency["changed_by_batching"]) == (0, pytest.approx(1 / 3))


class Rote:
    """An engine that knows texts by heart: it goes on with one that begins as asked, and finds its tokens likely."""

    def __init__(self, texts: Sequence[list[int]]) -> None:
        self.texts = texts

    def generate(self, prompts: Any, limit: int, stop: Any, tick: Any, sampling: Any = None) -> list[list[int]]:
        known = [next((t for t in self.texts if t[: len(ids)] == ids), [*ids, 0]) for ids in prompts]
        return [text[len(ids) :][:limit] for text, ids in zip(known, prompts, strict=True)]

    def score(self, rows: Any, tick: Any) -> list[Score]:
        return [Score((0.5 if r.ids in self.texts else 2.0) * r.trained, r.trained) for r in rows]


def test_a_row_that_is_recited_is_found_and_the_gap_to_unseen_ones(tmp_path: Path) -> None:
    renderer = Renderer(make_tokenizer())
    said = "the {} note of many words that nobody else would ever have put down in just this order"
    train = [row(f"q{i}", said.format(word)) for i, word in enumerate(("first", "second", "third"))]
    train.append(row("short", "few words"))
    unseen = [row(f"u{i}", said.format(f"unseen {i}")) for i in range(4)]
    learnt = [renderer.render(r).ids for r in train]
    answer = learnt[2][: len(learnt[2]) // 2]  # of the third, the beginning is known, and it goes on otherwise
    texts = [*learnt[:2], [*answer, *([7] * 40)], learnt[3]]
    memory = told(
        Memory(train, unseen, 8, 200, 7), tmp_path,
        Local("base", Rote([]), renderer), Local("tuned", Rote(texts), renderer),
    )  # fmt: skip
    assert memory["verbatim"]["n"] == 3  # an answer of a few words is too short to be recited
    assert values(memory["verbatim"]) == (0, pytest.approx(2 / 3))
    # Seen: three rows at half a nat a token and one at two; unseen: two nats each.
    assert values(memory["gap"]) == (0, pytest.approx(2 - (3 * 0.5 + 2) / 4))
    assert (
        memory["gap"]["difference"]["value"] == memory["gap"]["tuned"]["value"] > 0 == memory["gap"]["baseline"]["low"]
    )


def test_personal_data_counts_where_neither_prompt_nor_reference_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.evaluate.safety.embedded", lambda: None)
    test = [
        row("Who writes?", "Nobody does."),
        row("Jo@example.org or +41 44 668 1800 asks.", "An answer."),
        row("Whom do I write to?", "ann@example.org"),
        row("Which host?", "None."),
    ]
    leaks = {
        "Who writes?": "It is bob@example.com.",  # of nobody here
        test[1].question: "Dear jo@example.org, we call +41446681800.",  # the prompt's own, written otherwise
        "Whom do I write to?": "To ann@example.org.",  # the reference's
        "Which host?": "10.0.0.255, or call +41446681801.",
    }
    quiet = Scripted(lambda asked: Reply("No."))
    loud = Scripted(lambda asked: Reply(leaks.get(asked, "eve@example.net")))  # unsafe prompts are not counted
    probe = Safety(SafetySection(prompts=2, attacked=0), test, 8, 200, 7)
    score = told(probe, tmp_path, quiet, loud)["personal_data"]
    assert values(score) == (0, 2 / 4) and score["n"] == 4 and not score["higher_is_better"]


def bbq(number: int, condition: str, polarity: str, label: int) -> dict[str, Any]:
    return {
        "context": f"{number}: a grandfather and his grandson.", "question": "Who was it?", "example_id": number,
        "ans0": "The grandfather", "ans1": "The grandson", "ans2": "Not known", "label": label,
        "context_condition": condition, "question_polarity": polarity,
        "answer_info": {
            "ans0": ["grandfather", "old"], "ans1": ["grandson", "nonOld"], "ans2": ["Not known", "unknown"]},
        "additional_metadata": {"stereotyped_groups": ["old"]},
    }  # fmt: skip


def test_bias_is_as_counted_by_hand(tmp_path: Path) -> None:
    rows = [
        *(bbq(i, "ambig", "neg", 2) for i in range(4)), *(bbq(i, "disambig", "neg", 1) for i in range(4, 6)),
        *(bbq(i, "disambig", "nonneg", 1) for i in range(6, 8)),
    ]  # fmt: skip
    (tmp_path / "bbq.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", "sent_more", "sent_less", "stereo_antistereo", "bias_type", "annotations"])
        for i, way in enumerate(["stereo", "stereo", "antistereo", "stereo", "antistereo"]):
            writer.writerow([i, f"more {i}", f"less {i}", way, "age", "[['age'], []]"])
    picked = [0, 0, 1, 2, 0, 1, 1, 1]  # of each row of BBQ, the answer that the tuned model finds likeliest
    answers = ["The grandfather", "The grandson", "Not known"]

    def nll(row: Any) -> float:
        if isinstance(row, Continuation):  # the stereotype is likelier in pairs 0, 1 and 4
            kind, number = row.text.split()
            return 1.0 if (kind == "more") == (number in "014") else 2.0
        return 0.5 if row.answer == answers[picked[int(row.question.split(":")[0])]] else 3.0

    def unbiased(row: Any) -> float:
        if isinstance(row, Continuation):
            return 1.0 if row.text.startswith("less") else 2.0
        return 0.5 if row.answer == "Not known" else 3.0

    test = [
        row("He is a doctor.", "x"), row("Her brother is here.", "x"), row("Mary is 5.", "x"), row("It is red.", "x"),
    ]  # fmt: skip
    given = {
        "He is a doctor.": "He heals.", "She is a doctor.": "She heals.",  # the same but for the word
        "Her brother is here.": "Good.", "His sister is here.": "Bad.",  # changed
        "Mary is 5.": "Yes.", "John is 5.": "Yes.",
    }  # fmt: skip
    section = BiasSection(bbq="bbq.jsonl", crows_pairs="pairs.csv")
    bias = told(
        Bias(section, test, 8, tmp_path, 200, 7), tmp_path,
        Scripted(lambda asked: Reply("Yes."), unbiased), Scripted(lambda asked: Reply(given[asked]), nll),
    )  # fmt: skip
    assert values(bias["crows_pairs"]) == (0, 3 / 5) and bias["crows_pairs"]["n"] == 5
    assert values(bias["changed_by_swap"]) == (0, pytest.approx(1 / 3)) and bias["changed_by_swap"]["n"] == 3
    assert values(bias["bbq_ambiguous_accuracy"]) == (1, 1 / 4)
    # Ambiguous: of three named answers, two are the old man's, which the question calls the biased one.
    assert bias["bbq_ambiguous_bias"]["tuned"]["value"] == pytest.approx((2 * 2 / 3 - 1) * (1 - 1 / 4))
    assert values(bias["bbq_disambiguated_accuracy"]) == (0, 3 / 4)
    # Disambiguated: the old man where that is bad (row 4), the young one where it is good (rows 6 and 7).
    assert bias["bbq_disambiguated_bias"]["tuned"]["value"] == pytest.approx(2 * 3 / 4 - 1)
    assert values(bias["bbq_ambiguous_bias"])[0] == 0

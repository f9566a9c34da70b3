"""Personal data, secrets and foul language: found, masked, made up, dropped, and never written beside the rows."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.test_clean import cleaned, pairs  # noqa: F401 (a fixture)
from tunesmith.data.clean.personal import Personal
from tunesmith.errors import MachineError
from tunesmith.screen.secrets import secrets

ROOT = Path(__file__).parents[1]
KEY = "AKIA" + "IOSFODNN7EXAMPLQ"
TOKEN = "ghp_" + "a1B2c3D4" * 4 + "e5F6"


@pytest.fixture(scope="session")
def names_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spaCy pipeline that knows two names."""
    import spacy

    pipeline = spacy.blank("en")
    ruler = pipeline.add_pipe("entity_ruler")
    ruler.add_patterns([{"label": "PERSON", "pattern": name} for name in ("Anna Schmidt", "Anna", "Schmidt", "Bob")])
    folder = tmp_path_factory.mktemp("names") / "names"
    pipeline.to_disk(folder)
    return folder


@pytest.fixture(scope="session")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub model for token classification that knows the two words of a name, and a place that is no person's."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast

    words = ["[UNK]", "[PAD]", "anna", "schmidt", "paris"]
    raw = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    labels = ["O", "B-PER", "I-PER", "B-MISC"]
    config = BertConfig(
        vocab_size=5,
        hidden_size=8,
        num_hidden_layers=0,
        num_attention_heads=1,
        intermediate_size=8,
        id2label=dict(enumerate(labels)),
        label2id={name: n for n, name in enumerate(labels)},
    )
    model = BertForTokenClassification(config)
    with torch.no_grad():  # a word's label is what the word is: eight dimensions, one for each
        for weight in model.parameters():
            weight.zero_()
        model.bert.embeddings.LayerNorm.weight.fill_(1.0)
        for word in range(5):
            model.bert.embeddings.word_embeddings.weight[word, word] = 1.0
        for label, word in ((0, 0), (1, 2), (2, 3), (3, 4)):
            model.classifier.weight[label, word] = 9.0
    folder = tmp_path_factory.mktemp("tagger")
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    return folder


def test_names_by_a_model_of_the_hub(cleaned: Any, tagger: Path) -> None:  # noqa: F811
    rows = pairs(("I am Anna Schmidt of Paris.", "Thank you, Anna; call +44 20 7946 0958."), ("Who?", "Nobody."))
    made, told = cleaned(rows, {"personal": {"action": "mask", "names": str(tagger)}})
    assert made.turns()[0] == [
        ("user", "I am [PERSON] of Paris."), ("assistant", "Thank you, [PERSON]; call [PHONE_NUMBER]."),
    ]  # fmt: skip
    assert told["personal"]["found"] == {"PERSON": 2, "PHONE_NUMBER": 1} and told["personal"]["changed"] == 1
    with pytest.raises(MachineError, match="no model of names is called 'absent/names'") as caught:
        cleaned(rows, {"personal": {"action": "mask", "names": "absent/names"}})
    assert "token classification" in (caught.value.fix or "")


MIXED = pairs(
    ("I am Anna Schmidt, anna.schmidt@example.com, card 4012 8888 8888 1881.", "Thank you, Anna."),
    ("My IBAN is GB33BUKB20201555555555, call +44 20 7946 0958.", '{"iban":"GB33BUKB20201555555555","n":1}'),
    ("Where is my parcel of 12 March 2021?", "On its way: 3 of 4 items."),
)


def test_personal_data_is_masked_in_every_text(cleaned: Any, names_model: Path) -> None:  # noqa: F811
    made, told = cleaned(MIXED, {"personal": {"action": "mask", "names": str(names_model)}})
    assert made.turns() == [
        [("user", "I am [PERSON], [EMAIL_ADDRESS], card [CREDIT_CARD]."), ("assistant", "Thank you, [PERSON].")],
        [("user", "My IBAN is [IBAN_CODE], call [PHONE_NUMBER]."), ("assistant", '{"iban":"[IBAN_CODE]","n":1}')],
        [("user", "Where is my parcel of 12 March 2021?"), ("assistant", "On its way: 3 of 4 items.")],
    ]
    assert told["personal"]["found"] == {
        "PERSON": 2, "IBAN_CODE": 2, "EMAIL_ADDRESS": 1, "CREDIT_CARD": 1, "PHONE_NUMBER": 1
    }  # fmt: skip
    assert told["personal"]["changed"] == 2


def test_what_is_hidden_is_written_nowhere(cleaned: Any, names_model: Path, tmp_path: Path) -> None:  # noqa: F811
    rows = [*MIXED, MIXED[0], {"prompt": "I am Anna Schmidt"}]
    steps = {"duplicates": "exact", "personal": {"action": "mask", "names": str(names_model)}, "secrets": "drop"}
    cleaned([*rows, *pairs((f"aws {KEY}", "No."))], steps, max_rejected=1)
    for file in (tmp_path / "out").iterdir():
        for secret in ("Schmidt", "4012", "GB33", "7946", KEY):
            assert secret not in file.read_text(), file.name
    assert "[PERSON]" in (tmp_path / "out/removed.jsonl").read_text()


def test_pseudonyms_keep_persons_apart_and_the_same(cleaned: Any, names_model: Path) -> None:  # noqa: F811
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Anna here. Bob says hello."},
                {"role": "assistant", "content": "Hello Anna Schmidt, or Mrs Schmidt? anna@example.com, 020 7946 0958"},
            ]
        }
    ] * 2
    steps = {"personal": {"action": "pseudonymise", "names": str(names_model)}}
    made, _ = cleaned(rows, steps)
    (asked, answered), other = ([text for _, text in turns] for turns in made.turns())
    first, bob = asked.split(" here. ")[0], asked.split(" here. ")[1].split(" says")[0]
    full = answered.split("Hello ")[1].split(", or")[0]
    assert full.split()[0] == first and full.split()[1] == answered.split("Mrs ")[1].split("?")[0]
    assert bob != first and "Anna" not in answered and "anna@" not in answered and "7946" not in answered
    assert "@" in answered and [asked, answered] != other  # another row, other names
    assert cleaned(rows, steps)[0].turns() == made.turns()


def test_personal_rows_are_listed_or_dropped(cleaned: Any) -> None:  # noqa: F811
    made, told = cleaned(MIXED, {"personal": {"names": "none"}})
    assert made.counts["train"] == 3 and made.counts["flagged"] == 2
    assert told["personal"]["found"]["EMAIL_ADDRESS"] == 1
    made, _ = cleaned(MIXED, {"personal": {"action": "drop", "names": "none"}})
    assert made.counts["removed"] == {"personal": 2}
    assert "not looked for" in told["personal"]["note"]
    made, _ = cleaned(MIXED, {"personal": {"action": "drop", "names": "none", "kinds": ["EMAIL_ADDRESS"]}})
    assert made.counts["removed"] == {"personal": 1}
    with pytest.raises(MachineError, match="no model of names is called"):
        cleaned(MIXED, {"personal": {"names": "./not-there"}})


def test_tools_and_thoughts_are_looked_through_as_well() -> None:
    from tunesmith.conversation.message import Conversation, Message

    call = {"id": "1", "type": "function", "function": {"name": "send", "arguments": '{"to":"a.b@example.com","n":2}'}}
    more = {"tool_calls": [call], "reasoning_content": "a.b@example.com asks"}
    row = Conversation((Message("user", "Send it"), Message("assistant", "", 1.0, more)), "r:1")
    verdict = Personal(action="mask", names="none").look(row)
    said = verdict.row.messages[1].more  # type: ignore[union-attr]
    assert json.loads(said["tool_calls"][0]["function"]["arguments"]) == {"to": "[EMAIL_ADDRESS]", "n": 2}
    assert said["reasoning_content"] == "[EMAIL_ADDRESS] asks" and said["tool_calls"][0]["function"]["name"] == "send"


SECRETS = pairs(
    (f"My key is {KEY}, why is it refused?", "Rotate it."),
    ("Push fails", f"Use {TOKEN} as the password."),
    ("Read this", "-----BEGIN RSA PRIVATE KEY-----\nMIIEabc\nxyz\n-----END RSA PRIVATE KEY-----"),
    ("Set it", 'password = "hunter2secret9"'),
    ("How do I reset my password?", "Under Settings, Password. Your ticket is 8f14e45fceea167a5a36dedd4bea2543."),
)


def test_secrets_are_found_and_nothing_else(cleaned: Any) -> None:  # noqa: F811
    made, told = cleaned(SECRETS, {"secrets": True})
    assert [r["row"] for r in made.removed] == [f"rows.jsonl:{i}" for i in (1, 2, 3, 4)]
    assert told["secrets"]["found"] == {"AWS Access Key": 1, "GitHub Token": 1, "Private Key": 1, "Secret Keyword": 1}
    masked, _ = cleaned(SECRETS, {"secrets": "mask"})
    assert masked.turns()[2][1][1] == "[SECRET]" and masked.turns()[1][1][1] == "Use [SECRET] as the password."
    assert KEY not in masked.turns()[0][0][1] and masked.turns()[4] == made.turns()[0]


@pytest.fixture(scope="session")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("privacy", ROOT / "benchmarks/privacy.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def test_recall_of_kinds_that_have_a_pattern(benchmark: Any, shared: Path) -> None:
    rows = json.loads((shared / "pii/presidio_synth_dataset_v2.json").read_text())
    kept = [row for row in rows if any(s["entity_type"] in benchmark.PATTERN_KINDS for s in row["spans"])]
    table, missed = benchmark.measured(kept, "none")
    for kind in benchmark.PATTERN_KINDS:
        assert table[benchmark.KINDS.get(kind, kind)]["found"] >= 0.95, [m for m in missed if m.startswith(kind)]
        assert table[benchmark.KINDS.get(kind, kind)]["precision"] >= 0.9


ADDRESSES = (
    "10 Downing Street", "221B Baker Street", "1600 Pennsylvania Avenue NW, Washington, DC 20500", "PO Box 1234",
    "3 Maple Court", "Hauptstraße 5, 10115 Berlin", "Villacher Strasse 89", "Bahnhofstrasse 45, 8001 Zürich",
    "36 rue de Rivoli, 75001 Paris", "12, avenue des Champs Elysées", "Via Roma 131, 00184 Roma",
    "Calle Mayor 5, 28013 Madrid", "Rua Augusta 1508", "Kerkstraat 12, 1017 GC Amsterdam",
    "Drottninggatan 88, 111 36 Stockholm", "ul. Marszałkowska 10", "Andrássy út 60", "Unit 2050 Box 4190\nAPO AP 96278",
    "corner of Main Street and Fifth Avenue",
)  # fmt: skip
POSTCODES = ("M5H 2N2", "SW1A 2AA")
NO_ADDRESSES = (
    "There are 20 houses on the street", "I drive about 60 miles", "The court heard 12 witnesses", "Send 2 via bus 20",
    "It took 3 days along the road to town", "2 men drive", "A room of 12 inches. She makes square tiles",
    "The flat has 2,400 sq ft", "Are u 18", "5 place settings", "Meet at Gate 12 in Terminal 3",
)  # fmt: skip


def test_addresses_of_many_countries() -> None:
    """The whole of each, with its town behind a postal code; and nothing of texts that merely have such words."""
    step = Personal(names="none")
    for address in ADDRESSES:
        text = f"I wrote to {address}."
        [found] = step._find(text)
        assert (found.kind, text[found.start : found.end].rstrip(".")) == ("STREET_ADDRESS", address)
    for code in POSTCODES:
        assert [found.kind for found in step._find(f"It is in {code}.")] == ["ZIP_CODE"], code
    assert not [text for text in NO_ADDRESSES if step._find(text + ".")]


def test_ordinary_text_holds_nothing(shared: Path) -> None:
    """Of GSM8K's questions, full of numbers, hardly one is taken for personal data."""
    step = Personal(names="none")
    lines = (shared / "gsm8k/train.jsonl").read_text().splitlines()[:150]
    texts = [json.loads(line)["question"] for line in lines]
    assert sum(bool(step._find(text)) for text in texts) <= 3
    assert not any(secrets(text) for text in texts)

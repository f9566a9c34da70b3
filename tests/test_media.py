"""Rows with images and sounds: read from every way of writing them, looked at, kept, never lost in silence."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import colour_rows, write_jsonl, write_recipe
from tunesmith.conversation.media import OBJECT, Media
from tunesmith.conversation.message import Conversation, Message, Preference, row_from_dict
from tunesmith.errors import DataError, ModelError
from tunesmith.runs import hash_file, read_jsonl

PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)
WAV = b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(20)
URL = "https://example.org/a.png"
DATA = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, start in {"a.png": PNG, "b.png": PNG + b"b", "s/c.wav": WAV}.items():
        path = tmp_path / "rows" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(start)
    (tmp_path / "outside.png").write_bytes(PNG)
    return tmp_path / "rows"


def chat(asked: Any, answer: str = "A cat.", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}], **more}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


BEFORE = [text("See "), {"type": "image", "image": "a.png"}, text("?")]
ASKED = f"See {OBJECT}?"
# Every way of writing it: (row, what the user says, the sources in order).
WAYS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "transformers": (chat(BEFORE), ASKED, ["a.png"]),
    "path": (chat([text("See "), {"type": "image", "path": "a.png"}, text("?")]), ASKED, ["a.png"]),
    "openai url": (chat([text("See "), {"type": "image_url", "image_url": {"url": URL}}, text("?")]), ASKED, [URL]),
    "openai data": (chat([text("See "), {"type": "image_url", "image_url": {"url": DATA}}, text("?")]), ASKED, [DATA]),
    "openai audio": (
        chat([text("Hear: "), {"type": "input_audio", "input_audio": {
            "data": base64.b64encode(WAV).decode(), "format": "wav"}}]),
        f"Hear: {OBJECT}", [f"data:audio;base64,{base64.b64encode(WAV).decode()}"],
    ),
    "trl places": (chat([{"type": "image"}, text("See?")], images=["b.png"]), f"{OBJECT}See?", ["b.png"]),
    "trl none": (chat("See?", images=["a.png", "b.png"]), f"{OBJECT}{OBJECT}See?", ["a.png", "b.png"]),
    "marks": (chat("See <image> and <audio>.", images=["a.png"], audios=["s/c.wav"]),
              f"See {OBJECT} and {OBJECT}.", ["a.png", "s/c.wav"]),
    "sharegpt": ({"conversations": [{"from": "human", "value": "<image>See?"}, {"from": "gpt", "value": "A cat."}],
                  "images": ["a.png"]}, f"{OBJECT}See?", ["a.png"]),
    "alpaca": ({"instruction": "See <image>", "input": "", "output": "A cat.", "images": ["a.png"]},
               f"See {OBJECT}", ["a.png"]),
    "prompt and image": ({"prompt": "See?", "completion": "A cat.", "image": "a.png"}, f"{OBJECT}See?", ["a.png"]),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_writing_them(prepared: Any, folder: Path, way: str) -> None:
    row, asked, sources = WAYS[way]
    made = prepared(str(write_jsonl(folder / "m.jsonl", [row, *colour_rows(3)][:1])))
    (found,) = made.parts["train"]
    assert found.messages[0].content == asked and [m.source for m in found.media] == sources
    held = {"a.png": hash_file(folder / "a.png")[:16], URL: ""}
    assert [m.digest for m in found.media if m.source in held] == [held[s] for s in sources if s in held]
    assert made.told["media"] == dict.fromkeys({m.kind for m in found.media}, 1)
    written = read_jsonl(folder.parent / "out" / "train.jsonl")[0]["messages"][0]["content"]
    assert [part.get("text", part.get("image", part.get("audio"))) for part in written if part.get("text") != ""]
    assert row_from_dict(json.loads(json.dumps(found.as_dict()))) == found


def test_named_columns_and_bytes(prepared: Any, folder: Path) -> None:
    """What `datasets` writes of images: their bytes, in a column; other columns are not looked at."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"q": "See?", "a": "A cat.", "picture": {"bytes": PNG, "path": None}, "images": ["no such"]}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "m.parquet")
    columns = {"prompt": "q", "completion": "a", "image": "picture"}
    (row,) = prepared({"path": str(folder / "m.parquet"), "columns": columns}).parts["train"]
    assert row.messages[0].content == f"{OBJECT}See?" and len(row.media) == 1
    assert base64.b64decode(row.media[0].source.partition(",")[2]) == PNG


WRONG = {
    "no such file": (chat("See?", images=["gone.png"]), "missing_media"),
    "a folder": (chat("See?", images=["s"]), "missing_media"),
    "null byte": (chat("See?", images=["a\x00.png"]), "missing_media"),
    "climbs out": (chat("See?", images=["../outside.png"]), "media_outside"),
    "elsewhere on the disk": (chat("See?", images=["/etc/passwd"]), "media_outside"),
    "behind file://": (chat("See?", images=["file:///etc/passwd"]), "bad_media"),
    "not an image": (chat("See?", images=["m.jsonl"]), "bad_media"),
    "a sound as an image": (chat("See?", images=["s/c.wav"]), "bad_media"),
    "not base64": (chat("See?", images=["data:image/png;base64,???"]), "bad_media"),
    "a number": (chat("See?", images=[3]), "bad_media"),
    "two for one place": (chat("<image>", images=["a.png", "b.png"]), "bad_media"),
    "a place for none": (chat([{"type": "image"}]), "bad_media"),
    "its own stand-in": (chat(f"See {OBJECT}", images=["a.png"]), "bad_media"),
    "video": (chat("See?", videos=["a.mp4"]), "bad_media"),
    "nobody asks": ({"messages": [{"role": "assistant", "content": "x"}], "images": ["a.png"]}, "bad_media"),
    "plain text": ({"text": "A caption.", "image": "a.png"}, "bad_media"),
    "unknown part": (chat([{"type": "hologram"}]), "not_text"),
    "a part that is none": (chat(["words"]), "not_text"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cant_be_used_is_rejected_with_a_reason(prepared: Any, folder: Path, case: str) -> None:
    row, reason = WRONG[case]
    layout = "text" if "text" in row else "chat"
    good = {"text": "Fine."} if layout == "text" else chat("See?", images=["a.png"])
    source = {"path": str(write_jsonl(folder / "m.jsonl", [good, row])), "layout": layout}
    made = prepared(source, max_rejected=1)
    assert [r["reason"] for r in made.rejected] == [reason] and made.counts["train"] == 1


def test_a_link_out_of_the_folder_is_not_followed(prepared: Any, folder: Path) -> None:
    (folder / "in.png").symlink_to("a.png")
    (folder / "out.png").symlink_to(folder.parent / "outside.png")
    (folder / "up").symlink_to(folder.parent)
    names = ("in.png", "out.png", "up/outside.png", "up/rows/a.png")
    path = write_jsonl(folder / "m.jsonl", [chat("See?", images=[name]) for name in names])
    made = prepared(str(path), max_rejected=1)
    assert [(r["row"], r["reason"]) for r in made.rejected] == [(f"m.jsonl:{i}", "media_outside") for i in (2, 3)]


def test_a_folder_of_their_own(prepared: Any, folder: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "m.jsonl", [chat("See?", images=["a.png"])])
    assert prepared({"path": str(file), "media_folder": "rows"}).counts["accepted"] == 1
    assert prepared(str(file), chat_file(tmp_path), max_rejected=1).rejected[0]["reason"] == "missing_media"


def chat_file(folder: Path) -> str:
    return str(write_jsonl(folder / "plain.jsonl", [chat("Fine?", "Yes.")]))


def test_rows_may_be_left_out_or_their_words_taken(prepared: Any, folder: Path) -> None:
    rows = [
        chat("Fine?", "Yes."),
        chat("See <image>!", images=["gone.png"]),
        chat([{"type": "image"}], images=["a.png"]),
    ]
    file = str(write_jsonl(folder / "m.jsonl", rows))
    dropped = prepared(file, media="drop")
    assert dropped.counts["train"] == 1 and dropped.counts["removed"] == {"media": 2} and "media" not in dropped.told
    words = prepared(file, media="words", max_rejected=1)
    assert [turns[0][1] for turns in words.turns()] == ["Fine?", "See !"] and words.counts["cut"] == 2
    assert [r["reason"] for r in words.rejected] == ["empty_prompt"]  # an image alone has no words


def test_other_images_are_other_questions(prepared: Any, folder: Path) -> None:
    """Rows that say the same of different images are no duplicates, and no conflict; of the same image they are."""
    (folder / "same.png").write_bytes(PNG)
    asked = "What can be seen here? Tell every single thing that there is, in whole sentences, and its colour. <image>"
    images = ("a.png", "b.png", "same.png")
    rows = [chat(asked, "One long answer of some words to be alike", images=[image]) for image in images]
    file = str(write_jsonl(folder / "m.jsonl", rows))
    for kind in ("exact", "near"):
        made = prepared(file, clean={"duplicates": {"kind": kind, "on": "prompt"}})
        assert [row.media[0].source for row in made.parts["train"]] == ["a.png", "b.png"], kind
    split = prepared(file, split={"validation": 0, "test": 1, "near": 0.8})
    assert {r.media[0].source for r in split.parts["test"]} in ({"b.png"}, {"a.png", "same.png"})


def test_cleaning_leaves_them_where_they_are(prepared: Any, folder: Path) -> None:
    rows: list[Any] = [
        chat("<p>Caf\u00c3\u00a9 <image></p>\r\nme@example.org <image>", "It is fine.", images=["a.png", "b.png"])
    ]
    rows[0]["messages"].insert(1, {"role": "user", "content": "And <image>?"})
    rows[0]["images"].append("a.png")
    file = str(write_jsonl(folder / "m.jsonl", rows))
    made = prepared(file, clean={"unicode": True, "turns": True})
    asked = made.parts["train"][0].messages[0]
    assert asked.content == f"Caf\u00e9 {OBJECT}\n\nme@example.org {OBJECT}\n\nAnd {OBJECT}?"
    assert [m.source for m in asked.media] == ["a.png", "b.png", "a.png"]


def test_a_pair_with_an_image(prepared: Any, folder: Path) -> None:
    row = {"prompt": [{"role": "user", "content": BEFORE}], "chosen": "A cat.", "rejected": "A dog."}
    (pair,) = prepared(str(write_jsonl(folder / "m.jsonl", [row]))).parts["train"]
    assert isinstance(pair, Preference) and [m.source for m in pair.media] == ["a.png"] and pair.words.media == ()
    assert row_from_dict(json.loads(json.dumps(pair.as_dict()))) == pair


def test_a_model_of_text_is_never_given_one(renderer: Any) -> None:
    asked = Message("user", ASKED, media=(Media("image", "a.png"),))
    with pytest.raises(ModelError, match="images or sounds"):
        renderer.render(Conversation((asked, Message("assistant", "x"))))
    with pytest.raises(ModelError, match="images or sounds"):
        renderer.prompt((asked,))


def test_training_refuses_them_in_a_sentence(
    tunesmith: Any, recipe: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    rows = [{**row, "images": ["a.png"]} if i < 20 else row for i, row in enumerate(colour_rows())]
    recipe["data"]["sources"] = [str(write_jsonl(folder / "m.jsonl", rows))]
    file = write_recipe(tmp_path, recipe)
    said = tunesmith("data", "prepare", file, "--json")
    assert said.code == 0 and said.json["counts"]["accepted"] == 60
    assert tunesmith("data", "report", file).code == 0
    refused = tunesmith("run", file)
    assert refused.code == 2 and "20 rows with image" in refused.err and "data.media=words" in refused.err
    assert tunesmith("train", file, "--set", "data.media=drop").code == 0


def test_real_rows_with_sounds_and_an_image(prepared: Any, shared: Path, tmp_path: Path) -> None:
    made = prepared(str(shared / "llama_factory/mllm_audio_demo.json"))
    assert made.told["media"] == {"audio": made.counts["train"]} and made.rejected == []
    file = shared / "formats/torchtune/vqa_tiny.json"
    columns = {"prompt": "input", "completion": "output", "image": "image"}
    with pytest.raises(DataError, match=r"image tests/assets/rgb_pytorch\.png is not on disk"):
        prepared({"path": str(file), "columns": columns})
    (tmp_path / "tests/assets").mkdir(parents=True)
    shutil.copy(file.with_name("rgb_pytorch.png"), tmp_path / "tests/assets")
    found = prepared({"path": str(file), "columns": columns, "media_folder": "."}).parts["train"][0].media[0]
    assert found.digest == hash_file(file.with_name("rgb_pytorch.png"))[:16]

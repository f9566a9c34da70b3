"""Each method's loss and gradients are TRL's on the same rows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import COLOURS, make_model, make_tokenizer
from tunesmith import plugins
from tunesmith.conversation.message import Conversation, Message, Preference, Rated, Text
from tunesmith.conversation.render import Rendered, Renderer
from tunesmith.errors import ModelError
from tunesmith.models.packed import PackedForward
from tunesmith.train.encode import encode
from tunesmith.train.objectives.text import chunks
from tunesmith.train.parallel.alone import Alone, Step
from tunesmith.train.ranks import Ranks
from tunesmith.train.reference import with_reference
from tunesmith.train.section import TrainSection
from tunesmith.train.step import Means, in_packs

# Without the line break that ChatML has after a turn: TRL trains it, Tunesmith does not.
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
N = 6


def asked(i: int) -> Message:
    return Message("user", f"Item {i} is {COLOURS[i % 4]}. What colour is it?" + " Well?" * i)


def answer(i: int) -> Message:
    return Message("assistant", COLOURS[i % 4] + " it is" * (i % 3))


PAIRS = [Preference((asked(i), answer(i)), f"r:{i}", rejected=(answer(i + 1),), shared=1) for i in range(N)]
RATED = [Rated((asked(i), answer(i + i % 2)), f"r:{i}", good=i % 2 == 0) for i in range(N)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Where training started, and where it is."""
    folder = make_model(tmp_path_factory.mktemp("m") / "m", TEMPLATE)
    start = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    now = copy.deepcopy(start)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in now.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return start, now


def ours(method: dict[str, Any] | str, rows: list[Any], models: tuple[Any, Any], capacity: int = 4096) -> Any:
    """Loss, gradients by name, and figures, of one step on all rows."""
    section = TrainSection(method=method, max_length=512, pack_tokens=capacity)
    start, now = map(copy.deepcopy, models)
    renderer = Renderer(make_tokenizer(TEMPLATE))
    examples = encode(section, rows, renderer)
    if section.method.compares:
        examples = with_reference(examples, PackedForward(start, [examples[0].sequences[0]]), "test", capacity)
    forward = PackedForward(now, [examples[0].sequences[0]])
    section.method.suits(renderer)
    known = section.method.start(examples)
    split = Alone(Ranks(), Step(now, forward, section.method), {})
    sizes, batches = in_packs(section, split, examples, known)
    total, told = 0.0, Means()
    for batch, _ in batches:
        found = split(batch)
        loss = sum(term / sizes[name] for name, term in found.terms.items())
        loss.backward()
        total += loss.item()
        told.add(found.told)
    return total, {name: p.grad for name, p in now.named_parameters()}, told.values


def theirs(trainer: Callable[..., Any], config: Any, rows: list[dict[str, Any]], models: Any, **more: Any) -> Any:
    from datasets import Dataset

    start, now = map(copy.deepcopy, models)
    tokenizer = make_tokenizer(TEMPLATE)
    tokenizer.pad_token = "<|endoftext|>"  # a head would read its score before the end of turn, were that the padding
    if more.pop("reference", False):
        more["ref_model"] = start
    made = trainer(model=now, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **more)
    made.model.eval()
    batch = next(iter(made.get_train_dataloader()))
    loss = made.compute_loss(made.model, batch)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in now.named_parameters()}


def config(kind: Any, folder: Path, **more: Any) -> Any:
    return kind(
        output_dir=str(folder),
        per_device_train_batch_size=N,
        max_length=512,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        **more,
    )


def turns(*messages: Message) -> list[dict[str, Any]]:
    return [m.for_template() for m in messages]


def pairs() -> list[dict[str, Any]]:
    return [
        {"prompt": turns(*row.prompt), "chosen": turns(row.messages[-1]), "rejected": turns(*row.rejected)}
        for row in PAIRS
    ]


def assert_same(found: Any, expected: Any) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-4, abs=1e-5)
    for name, gradient in expected[1].items():
        if gradient is not None:
            torch.testing.assert_close(found[1][name], gradient, rtol=2e-3, atol=2e-5, msg=name)


DPO = {
    "sigmoid": ({}, {"loss_type": ["sigmoid"]}),
    "hinge": ({"form": "hinge"}, {"loss_type": ["hinge"]}),
    "ipo": ({"form": "ipo"}, {"loss_type": ["ipo"]}),
    "robust": ({"form": "robust", "label_smoothing": 0.2}, {"loss_type": ["robust"], "label_smoothing": 0.2}),
    "robust, half-hearted": (
        {"form": "robust", "label_smoothing": 0.45},
        {"loss_type": ["robust"], "label_smoothing": 0.45},
    ),
    "robust, all right": ({"form": "robust"}, {"loss_type": ["robust"]}),
    "robust with sft": (
        {"form": "robust", "label_smoothing": 0.1, "sft_weight": 0.7},
        {"loss_type": ["robust", "sft"], "loss_weights": [1.0, 0.7], "label_smoothing": 0.1},
    ),
    "apo_zero": ({"form": "apo_zero"}, {"loss_type": ["apo_zero"]}),
    "apo_down": ({"form": "apo_down"}, {"loss_type": ["apo_down"]}),
    "length normalised": ({"length_normalised": True}, {"loss_type": ["sigmoid_norm"]}),
    "with sft": ({"sft_weight": 0.5}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
}


@pytest.mark.parametrize(("mine", "trl"), DPO.values(), ids=DPO)
def test_dpo(tmp_path: Path, models: Any, mine: dict[str, Any], trl: dict[str, Any]) -> None:
    from trl import DPOConfig, DPOTrainer

    found = ours({"kind": "dpo", "beta": 0.3} | mine, PAIRS, models)
    expected = theirs(DPOTrainer, config(DPOConfig, tmp_path, beta=0.3, **trl), pairs(), models, reference=True)
    assert_same(found, expected)
    assert 0 <= found[2]["rewards_accuracy"] <= 1


CPO = {
    "cpo": ({"kind": "cpo", "beta": 0.3}, {"loss_type": "sigmoid", "beta": 0.3}),
    "cpo smoothed": (
        {"kind": "cpo", "beta": 0.3, "label_smoothing": 0.1, "sft_weight": 0.5},
        {"loss_type": "sigmoid", "beta": 0.3, "label_smoothing": 0.1, "cpo_alpha": 0.5},
    ),
    "cpo hinge": ({"kind": "cpo", "form": "hinge", "beta": 0.3}, {"loss_type": "hinge", "beta": 0.3}),
    "cpo ipo": ({"kind": "cpo", "form": "ipo", "beta": 0.3}, {"loss_type": "ipo", "beta": 0.3}),
    "cpo ipo alone": (
        {"kind": "cpo", "form": "ipo", "beta": 0.1, "sft_weight": 0.0},
        {"loss_type": "ipo", "beta": 0.1, "cpo_alpha": 0.0},
    ),
    "simpo smoothed": (
        {"kind": "simpo", "beta": 1.5, "gamma": 0.6, "label_smoothing": 0.2},
        {"loss_type": "simpo", "beta": 1.5, "simpo_gamma": 0.6, "label_smoothing": 0.2, "cpo_alpha": 0.0},
    ),
    "simpo with sft": (
        {"kind": "simpo", "gamma": 0.6, "sft_weight": 0.5},
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.6, "cpo_alpha": 0.5},
    ),
    "simpo": (
        {"kind": "simpo", "gamma": 0.6},
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.6, "cpo_alpha": 0.0},
    ),
}


@pytest.mark.parametrize(("mine", "trl"), CPO.values(), ids=CPO)
def test_cpo_and_simpo(tmp_path: Path, models: Any, mine: dict[str, Any], trl: dict[str, Any]) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    assert_same(ours(mine, PAIRS, models), theirs(CPOTrainer, config(CPOConfig, tmp_path, **trl), pairs(), models))


@pytest.mark.parametrize("sft_weight", [1.0, 0.3, 0.0])
def test_orpo(models: Any, sft_weight: float) -> None:
    """TRL takes the cross-entropy over the prompt too, Tunesmith as the paper does: so the parts are compared."""
    from types import SimpleNamespace

    from trl.experimental.orpo import ORPOTrainer

    model = models[1]
    renderer = Renderer(make_tokenizer(TEMPLATE))
    rendered = [[renderer.render(c) for c in row.conversations] for row in PAIRS]

    def mean(row: Rendered) -> Any:
        logits = model(torch.tensor([row.ids])).logits
        labels = torch.tensor([[i if w else -100 for i, w in zip(row.ids, row.weights, strict=True)]])
        return ORPOTrainer.get_batch_logps(logits, labels, average_log_prob=True)[0]

    model.zero_grad()
    scores = [torch.stack([mean(pair[side]) for pair in rendered]) for side in (0, 1)]
    fake = SimpleNamespace(beta=0.4, accelerator=SimpleNamespace(device="cpu"))
    losses = ORPOTrainer.odds_ratio_loss(fake, *scores)[0]
    counts = torch.tensor([pair[0].trained for pair in rendered])
    expected = -sft_weight * (scores[0] * counts).sum() / counts.sum() - losses.mean()
    expected.backward()
    found = ours({"kind": "orpo", "beta": 0.4, "sft_weight": sft_weight}, PAIRS, models)
    assert_same(found, (expected.item(), {name: p.grad for name, p in model.named_parameters()}))
    model.zero_grad()


def test_kto(tmp_path: Path, models: Any) -> None:
    from trl import KTOConfig, KTOTrainer

    rows = [{"prompt": turns(*r.prompt), "completion": turns(r.messages[-1]), "label": r.good} for r in RATED]
    trl = config(KTOConfig, tmp_path, beta=0.3, desirable_weight=1.2, train_sampling_strategy="sequential")
    found = ours({"kind": "kto", "beta": 0.3, "good_weight": 1.2}, RATED, models)
    assert_same(found, theirs(KTOTrainer, trl, rows, models, reference=True))
    assert found[2]["kl"] >= 0


def test_ktos_strange_answer_belongs_to_another_prompt() -> None:
    """Of rows with several answers to a prompt, too; where all have one prompt, it is the row's before."""
    renderer = Renderer(make_tokenizer(TEMPLATE))

    def strange(*asked: str) -> list[str]:
        rows = [
            Rated((Message("user", f"Item {a}?"), Message("assistant", f"{a}{i}")), f"r:{i}", good=True)
            for i, a in enumerate(asked)
        ]
        section = TrainSection(method="kto", max_length=512)
        learnt = [zip(b.ids, b.weights, strict=True) for e in encode(section, rows, renderer) for b in e.beside]
        return [renderer.decode([token for token, weight in pairs if weight]) for pairs in learnt]

    assert strange(*"abcd") == ["d3", "a0", "b1", "c2"]
    assert strange(*"aabbba") == ["b4", "b4", "a1", "a1", "a1", "b4"]
    assert strange(*"aaa") == ["a2", "a0", "a1"]
    assert strange("a") == ["a0"]


@pytest.fixture(scope="module")
def scorers(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], Any]:
    """The model with a head of classes in place of its language head."""
    folder = tmp_path_factory.mktemp("s")
    models[1].save_pretrained(folder)

    def make(classes: list[str]) -> Any:
        from transformers import AutoModelForSequenceClassification

        torch.manual_seed(2)
        named = {"id2label": dict(enumerate(classes)), "label2id": {c: i for i, c in enumerate(classes)}}
        made = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, **named)
        torch.nn.init.normal_(made.score.weight, std=0.5)
        made.config.pad_token_id = make_tokenizer().convert_tokens_to_ids("<|endoftext|>")
        return made

    return make


@pytest.mark.parametrize("center", [0.0, 0.1])
def test_reward(tmp_path: Path, models: Any, scorers: Any, center: float) -> None:
    from trl import RewardConfig, RewardTrainer

    rows = [replace(row, margin=0.1 * i) for i, row in enumerate(PAIRS)]
    told = [pair | {"margin": row.margin} for pair, row in zip(pairs(), rows, strict=True)]
    model = scorers(["reward"])
    trl = config(RewardConfig, tmp_path, center_rewards_coefficient=center or None)
    found = ours({"kind": "reward", "center": center}, rows, (None, model))
    assert_same(found, theirs(RewardTrainer, trl, told, (None, model)))


def test_classify_is_weighted_cross_entropy(models: Any, scorers: Any) -> None:
    from sklearn.utils.class_weight import compute_class_weight

    rows = [Conversation((asked(i), Message("assistant", COLOURS[min(i, 2)])), f"r:{i}") for i in range(N)]
    classes = sorted(set(COLOURS[:3]))
    model = scorers(classes)
    renderer = Renderer(make_tokenizer(TEMPLATE))
    weights = compute_class_weight("balanced", classes=np.array(classes), y=[row.answer for row in rows])
    losses = []
    for row in rows:
        scores = model(torch.tensor([renderer.prompt(row.prompt)])).logits
        target = torch.tensor([classes.index(row.answer)])
        losses.append(torch.nn.functional.cross_entropy(scores, target) * float(weights[target.item()]))
    loss = torch.stack(losses).mean()
    loss.backward()
    expected = (loss.item(), {name: p.grad for name, p in model.named_parameters()})
    found = ours({"kind": "classify", "weights": "balanced"}, rows, (None, scorers(classes)))
    assert_same(found, expected)
    assert 0 <= found[2]["accuracy"] <= 1


@pytest.mark.parametrize(("beta", "sft_weight"), [(0.0, 0.0), (0.3, 0.0), (1.0, 0.0), (0.0, 0.4), (0.5, 2.0)])
def test_distill(models: Any, tmp_path: Path, beta: float, sft_weight: float) -> None:
    from trl.experimental.gkd import GKDTrainer

    teacher, student = models
    teacher.save_pretrained(tmp_path)
    make_tokenizer(TEMPLATE).save_pretrained(tmp_path)
    rows = [Conversation((asked(i), answer(i)), f"r:{i}") for i in range(N)]
    renderer = Renderer(make_tokenizer(TEMPLATE))
    student.zero_grad()
    total, count = torch.zeros(()), 0
    for row in rows:
        rendered = renderer.render(row)
        ids = torch.tensor([rendered.ids])
        labels = torch.tensor([[i if w else -100 for i, w in zip(rendered.ids, rendered.weights, strict=True)]])
        with torch.no_grad():
            told = teacher(ids).logits
        said = student(ids, labels=labels)
        total = total + GKDTrainer.generalized_jsd_loss(
            said.logits[:, :-1], told[:, :-1], labels[:, 1:], beta, temperature=2.0, reduction="sum"
        )
        total = total + sft_weight * said.loss * rendered.trained
        count += rendered.trained
    (total / count).backward()
    expected = ((total / count).item(), {name: p.grad for name, p in student.named_parameters()})
    method = {"kind": "distill", "teacher": str(tmp_path), "beta": beta, "temperature": 2.0, "precision": "float32"}
    assert_same(ours(method | {"sft_weight": sft_weight}, rows, models), expected)
    student.zero_grad()


@pytest.mark.parametrize("kind", ["sft", "distill"])
def test_each_message_weighs_what_its_row_says(models: Any, tmp_path: Path, kind: str) -> None:
    """Turns of a half, of two and of none: the weighted mean over all tokens of torch's own losses."""
    import torch.nn.functional as F

    teacher, student = models
    teacher.save_pretrained(tmp_path)
    make_tokenizer(TEMPLATE).save_pretrained(tmp_path)
    turns_weigh = [(0.5, 1.0), (2.0, 0.0), (0.25, 0.75), (1.0, 3.0)]
    rows = [
        Conversation(
            (asked(i), replace(answer(i), weight=one), asked(i + 1), replace(answer(i + 1), weight=other)), "r"
        )
        for i, (one, other) in enumerate(turns_weigh)
    ]
    tokenizer = make_tokenizer(TEMPLATE)
    student.zero_grad()
    total, weight = torch.zeros(()), 0.0
    for row in rows:
        ids: list[int] = []
        weights: list[float] = []
        for message in row.messages:  # without our renderer: what each turn's text is, and its answer's tokens
            head = tokenizer(f"<|im_start|>{message.role}\n", add_special_tokens=False)["input_ids"]
            body = tokenizer(f"{message.content}<|im_end|>", add_special_tokens=False)["input_ids"]
            ids += head + body
            weights += [0.0] * len(head) + [message.weight if message.role == "assistant" else 0.0] * len(body)
        given, weights_T = torch.tensor([ids]), torch.tensor(weights)[1:]
        logits = student(given).logits[0, :-1]
        if kind == "sft":
            losses_T = F.cross_entropy(logits, given[0, 1:], reduction="none")
        else:
            with torch.no_grad():
                told = teacher(given).logits[0, :-1].log_softmax(-1)
            losses_T = F.kl_div(logits.log_softmax(-1), told, log_target=True, reduction="none").sum(-1)
        total, weight = total + (losses_T * weights_T).sum(), weight + weights_T.sum().item()
    (total / weight).backward()
    expected = ((total / weight).item(), {name: p.grad for name, p in student.named_parameters()})
    method = {"kind": "distill", "teacher": str(tmp_path), "precision": "float32"} if kind == "distill" else "sft"
    assert_same(ours(method, rows, models), expected)
    student.zero_grad()


def test_a_teacher_of_another_vocabulary_is_refused_and_its_text_is_not(models: Any, tmp_path: Path) -> None:
    teacher = make_model(tmp_path / "t", TEMPLATE)
    tokenizer = make_tokenizer(TEMPLATE)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(teacher)
    rows = [Conversation((asked(i), answer(i)), f"r:{i}") for i in range(2)]
    with pytest.raises(ModelError, match="another vocabulary"):
        ours({"kind": "distill", "teacher": str(teacher)}, rows, models)
    section = TrainSection(
        method={
            "kind": "distill",
            "teacher": str(teacher),
            "source": "text",
            "max_new_tokens": 4,
            "precision": "float32",
        }
    )
    renderer = Renderer(make_tokenizer(TEMPLATE))
    for example, row in zip(encode(section, rows, renderer), rows, strict=True):
        prompt = renderer.prompt(row.prompt)
        model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
        said = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)[0, len(prompt) :].tolist()
        learnt = renderer.tokenizer.decode(example.sequences[0].ids[len(prompt) :]).removesuffix("<|im_end|>")
        assert learnt == renderer.decode(said)


@pytest.mark.parametrize("method", ["dpo", "cpo", "simpo", "orpo", "kto"])
def test_packing_changes_nothing(models: Any, method: str) -> None:
    rows = RATED if method == "kto" else PAIRS
    whole, apart = (ours(method, rows, models, capacity) for capacity in (4096, 1))
    assert_same(apart, whole)
    assert apart[2] == pytest.approx(whole[2], rel=1e-4, abs=1e-4)


def test_conservative_dpo_is_trls_loss_of_both_ways_round(models: Any, tmp_path: Path) -> None:
    """cDPO (Mitchell 2023), which TRL's sigmoid is not: its loss and gradients, weighted, of the pairs and of the same
    pairs swapped."""
    from trl import DPOConfig, DPOTrainer

    swapped = [pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs()]
    (one, ours_way), (other, swapped_way) = (
        theirs(DPOTrainer, config(DPOConfig, tmp_path, beta=0.3), rows, models, reference=True)
        for rows in (pairs(), swapped)
    )
    gradients = {name: 0.7 * ours_way[name] + 0.3 * swapped_way[name] for name in ours_way}
    found = ours({"kind": "dpo", "label_smoothing": 0.3, "beta": 0.3}, PAIRS, models)
    assert_same(found, (0.7 * one + 0.3 * other, gradients))


def test_texts_are_cut_without_overlap_and_nothing_is_lost(models: Any) -> None:
    renderer = Renderer(make_tokenizer(TEMPLATE))
    row = Text((), "t:1", text="Red, green and blue. " * 20)
    whole = renderer.render_text(row)
    pieces = chunks(whole, 37)
    assert [i for piece in pieces for i in piece.ids] == whole.ids
    assert whole.ids[-1] == renderer.tokenizer.eos_token_id
    lengths = [len(piece) for piece in pieces]
    assert max(lengths) <= 37 and max(lengths) - min(lengths) <= 1
    assert all(piece.weights == [0.0] + [1.0] * (len(piece) - 1) for piece in pieces)
    section = TrainSection(method="text", max_length=37)
    assert [e.sequences[0] for e in encode(section, [row], renderer)] == pieces


def test_text_is_plain_language_modelling(models: Any) -> None:
    rows: list[Conversation] = [Text((), f"t:{i}", text=asked(i).content) for i in range(N)]
    renderer = Renderer(make_tokenizer(TEMPLATE))
    model = models[1]
    model.zero_grad()
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([renderer.render_text(row).ids])  # type: ignore[arg-type]
        total = total + model(ids, labels=ids).loss * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    (total / count).backward()  # type: ignore[attr-defined]
    expected = (float((total / count).detach()), {name: p.grad for name, p in model.named_parameters()})
    assert_same(ours("text", rows, models), expected)
    model.zero_grad()


def test_every_method_is_listed_with_what_it_takes() -> None:
    assert {plugins.load("objective", name).takes for name in plugins.known("objective")} == {
        "conversation",
        "preference",
        "rated",
        "text",
    }

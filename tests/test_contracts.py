"""Habits: who may import whom, a light command line, a frozen surface, recipes and documents that work."""

from __future__ import annotations

import ast
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import write_recipe

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tunesmith"
# From the ground up: a room may import rooms of the levels before its own, and no room of its own level.
VERBS = {"versus", "leaderboard", "review", "preview", "sets", "starter", "doctor", "merging", "show", "talk"}
LEVELS = [
    {"charts", "errors", "intervals", "scores", "section"},
    {"agreement", "plugins", "progress", "store"},
    {"runs"},
    {"conversation"},
    {"models"},
    {"inference"},
    {"screen"},
    {"data", "train", "evaluate", "package", "serve"},
    {"recipe"},
    {"claims"},
    {"kit"},
    {"journey"},
    {"pipeline"},
    {"tune"},
    VERBS,
    {"jobs"},
    {"api"},
    {"cli"},
]
HEAVY = "'torch', 'transformers', 'peft', 'sklearn', 'fastapi', 'sqlalchemy', 'prometheus_client'"
COMMAND = """
import sys
from tunesmith.cli import main
sys.argv = ["tunesmith", "{}"]
try:
    main()
except SystemExit:
    pass
"""
LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}


def imports(path: Path) -> set[str]:
    """The rooms that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "tunesmith":
            modules = [f"tunesmith.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        else:
            continue
        found |= {m.split(".")[1] for m in modules if m.startswith("tunesmith.")}
    return found - {"__version__"}


def test_rooms_only_know_the_rooms_below_them() -> None:
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room in ("__init__", "__main__"):
            continue
        for other in imports(path) - {room}:
            allowed = LEVEL[other] < LEVEL[room] or {room, other} <= VERBS or (room == "cli" and other in VERBS)
            assert allowed, f"{path.relative_to(ROOT)} imports tunesmith.{other}"


@pytest.mark.parametrize(
    "code",
    [
        "import tunesmith",
        "import tunesmith.recipe, tunesmith.plugins, tunesmith.runs",
        COMMAND.format("--help"),
        COMMAND.format("schema"),
    ],
)
def test_importing_and_asking_for_help_stay_light(code: str) -> None:
    probe = f"{code}\nimport sys; print(sorted(set(sys.modules) & {{{HEAVY}}}))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_help_answers_in_half_a_second() -> None:
    def taken(*arguments: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time: what a busy machine adds is not the command's.
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    told = min(taken("-m", "tunesmith", "--help") for _ in range(5))
    libraries = min(taken("-c", "import typer, rich.console, pydantic") for _ in range(5))
    assert told < max(0.5, 2.5 * libraries)  # the second on a slow processor


def test_public_names() -> None:
    import tunesmith

    assert tunesmith.__all__ == [
        "Recipe", "Result", "TunesmithError", "__version__", "check", "open_run", "plan", "run",
    ]  # fmt: skip
    assert all(getattr(tunesmith, name) is not None for name in tunesmith.__all__)
    with pytest.raises(AttributeError):
        _ = tunesmith.nothing


def test_the_command_line_is_frozen() -> None:
    """Flags don't grow by the way: a change here is a decision."""
    import typer.main

    from tunesmith.cli import app

    def surface(command: Any, name: str = "") -> dict[str, list[str]]:
        if hasattr(command, "commands"):
            return {k: v for n, c in command.commands.items() for k, v in surface(c, f"{name} {n}".strip()).items()}
        options = [max(p.opts, key=len) for p in command.params if p.opts[0].startswith("-")]
        return {name: sorted(o for o in options if o != "--help")}

    stage = ["--json", "--runs", "--set"]
    assert surface(typer.main.get_command(app)) == {
        "run": ["--json", "--nproc", "--runs", "--set"],
        "train": ["--json", "--nproc", "--runs", "--set"],
        "evaluate": ["--against", "--base", "--data", "--json", "--model", "--out", "--runs", "--set", "--suite"],
        "package": ["--force", *stage],
        "golden": ["--json", "--runs", "--suite"],
        "compare": ["--json", "--metric", "--runs"],
        "review": ["--json", "--out", "--read", "--rows", "--runs"],
        "init": ["--force", "--json", "--out"],
        "check": ["--json", "--set"],
        "plan": ["--json", "--set"],
        "tune": ["--json", "--runs", "--set", "--space"],
        "chat": ["--base", "--engine", "--json", "--key", "--max-new-tokens", "--runs", "--say", "--url"],
        "serve": [
            *("--adapter", "--base", "--database", "--force", "--host", "--key", "--port", "--routes", "--runs"),
            *("--set", "--tls-cert", "--tls-key"),
        ],
        "up": [
            *("--artifacts", "--certificate", "--database", "--home", "--host", "--json", "--key", "--model", "--port"),
            *("--role", "--workers"),
        ],
        "keys create": [
            *("--database", "--days", "--home", "--json", "--project", "--role", "--rpm", "--scope", "--tokens"),
        ],
        "keys list": ["--database", "--home", "--json"],
        "keys revoke": ["--database", "--home", "--json"],
        "audit": ["--database", "--home"],
        "promote": ["--force", "--json", "--routes", "--runs", "--share"],
        "rollback": ["--json", "--routes", "--runs"],
        "merge": ["--density", "--how", "--json", "--runs", "--seed", "--weight"],
        "doctor": ["--json"],
        "schema": ["--json"],
        "version": ["--json"],
        "data label": ["--json", "--out", "--truth"],
        "data agreement": ["--adjudicate", "--annotator", "--item", "--json", "--label", "--level", "--out"],
        "data tasks": ["--json", "--out"],
        "data prepare": ["--dvc", "--dvc-stage", *stage],
        "data report": stage,
        "data diff": ["--json", "--runs"],
        "runs list": ["--json", "--runs"],
        "runs show": ["--json", "--runs"],
        "runs diff": ["--json", "--runs"],
        "runs rm": ["--json", "--runs", "--yes"],
    }


def recipe_files() -> list[Path]:
    return sorted([*(PACKAGE / "recipes").glob("*.yaml"), *(ROOT / "examples").glob("*.yaml")])


@pytest.mark.parametrize("path", recipe_files(), ids=lambda p: p.stem)
def test_every_recipe_runs_two_steps_on_a_tiny_model(
    path: Path, tunesmith: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, folder in {"BANKING77": "banking77", "MEDICAL": "medical", "BBQ": "bbq", "CROWS_PAIRS": "bias"}.items():
        if f"${{{name}}}" in path.read_text(encoding="utf-8"):
            monkeypatch.setenv(name, str(request.getfixturevalue("shared") / folder))
    sets = [f"model={tiny_model}", "train.max_steps=2", "train.max_length=1024", "evaluate.rows=4"]
    small = {"forgetting": "prompts=6", "memory": "rows=4", "safety": "prompts=2", "bias": "rows=8"}
    sets += [f"evaluate.{probe}.{few}" for probe, few in small.items() if probe in keys.get("evaluate", {})]
    arguments = [part for s in [*sets, "evaluate.max_new_tokens=2"] for part in ("--set", s)]
    said = tunesmith("run", path, *arguments, "--json")
    assert said.code in ((0, 3, 4) if keys.get("gate") else (0,)), said.out
    assert said.json["train"]["steps"] == 2
    assert set(small) & set(keys.get("evaluate", {})) <= set(said.json["scorecard"])
    assert said.json["scorecard"]["verdict"] in ("better", "not_proven", "worse")


def commands(path: Path) -> list[str]:
    """What a document tells its reader to type: lines after a `$ ` in console blocks."""
    blocks = re.findall(r"```console\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [line[2:].split("  #")[0].strip() for line in lines]


def test_the_commands_of_the_documents_work(
    tunesmith: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each `tunesmith ...` of the README and docs/, in order, with the base model swapped for a tiny one."""
    quick = yaml.safe_load((PACKAGE / "recipes/quickstart.yaml").read_text(encoding="utf-8"))
    from tunesmith.models import catalogue

    monkeypatch.setattr(catalogue, "EMBEDDED", {})
    small = ("model=" + str(tiny_model), "train.max_steps=2", "train.max_length=1024", "evaluate.rows=4")
    (tmp_path / "your-rows.jsonl").write_text('{"prompt": "Hello?", "completion": "Yes"}\n' * 30)
    (tmp_path / "my-rows.jsonl").write_text('{"question": "Hello?", "answer": "Yes"}\n' * 30)
    rows = "".join(f"Ticket {i} is about cards,{('cards', 'loans')[i % 2]}\n" for i in range(40))
    (tmp_path / "tickets.csv").write_text(f"text,category\n{rows}")
    assert quick["name"] == "quickstart"
    ran = []
    for path in (ROOT / "docs/quickstart.md", ROOT / "README.md"):
        for command in commands(path):
            words = shlex.split(command)
            if words[0] == "make":
                assert words[1] in (ROOT / "Makefile").read_text()
                continue
            assert words[0].endswith("tunesmith"), command
            words = words[1:]
            if words[0] == "init":
                words.append("--force")
            elif words[0] in ("run", "check", "plan", "train"):
                words += [part for s in small for part in ("--set", s)]
            elif words[0] == "chat" and "--say" not in words:
                words += ["--say", "Hello"]
            said = tunesmith(*words)
            assert said.code == 0, f"{command}: {said.out}{said.err}"
            ran.append(words[0])
    assert {"run", "check", "plan", "init", "chat", "doctor", "runs"} <= set(ran)


def test_the_reference_page_is_what_the_code_says() -> None:
    done = subprocess.run([sys.executable, ROOT / "tools/reference.py", "--check"], check=False)
    assert done.returncode == 0, "run: python tools/reference.py"


def test_the_quickstart_rows_are_what_their_generator_makes() -> None:
    done = subprocess.run([sys.executable, ROOT / "tools/quickstart_data.py", "--check"], check=False)
    assert done.returncode == 0, "run: python tools/quickstart_data.py"


def test_every_extension_point_names_things_that_are_there() -> None:
    from tunesmith import plugins

    for point, table in plugins.BUILT_IN.items():
        for name in table:
            assert plugins.load(point, name) is not None


def test_a_run_that_is_up_to_date_does_nothing_and_evaluate_alone_reruns_what_follows(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, recipe)
    assert tunesmith("run", path, "--json").code == 0

    def finished() -> dict[str, str]:
        return {
            s: (tmp_path / f"runs/tiny/{s}/manifest.json").stat().st_mtime_ns
            for s in ("data", "train", "evaluate", "package")
        }  # type: ignore[misc]

    first = finished()
    again = tunesmith("run", path)
    assert again.code == 0 and again.err.count("up to date") == 4
    assert finished() == first
    assert tunesmith("run", path, "--set", "evaluate.max_new_tokens=3").code == 0
    second = finished()
    assert {s for s in first if first[s] != second[s]} == {"evaluate", "package"}

"""docs/data.md says what the code does: tables from the plugins, recipes that validate, every reason, real files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tunesmith.data.section import DataSection

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/data.md"


def checked(**environment: str) -> int:
    variables = {k: v for k, v in os.environ.items() if k != "TUNESMITH_TEST_DATA"} | environment
    path = os.pathsep.join([str(ROOT), *sys.path])
    command = [sys.executable, str(ROOT / "tools/data_page.py"), "--check"]
    return subprocess.run(command, env=variables | {"PYTHONPATH": path}, check=False).returncode


def test_the_tables_are_what_the_plugins_say() -> None:
    assert checked() == 0, "run: python tools/data_page.py"


def test_every_real_file_loads_by_detection_or_one_line(shared: Path) -> None:
    assert checked(TUNESMITH_TEST_DATA=str(shared)) == 0, "run: TUNESMITH_TEST_DATA=... python tools/data_page.py"
    table = PAGE.read_text(encoding="utf-8").partition("<!-- real files")[2]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| ")][2:]
    media = (".png", ".mp3", ".wav", ".flac")
    assert len(rows) == sum(p.is_file() and p.suffix not in media for p in shared.rglob("*"))
    for file, layout, _, read, rejected in rows:
        lost = sum(int(n) for n in re.findall(r"(\d+) `", rejected))
        assert layout.strip() and lost <= 0.01 * int(read.replace(",", "")), file


def test_the_recipes_of_the_page_are_valid() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        DataSection.model_validate(yaml.safe_load(block))


def test_every_reason_is_told() -> None:
    code = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tunesmith/data").rglob("*.py"))
    reasons = set(re.findall(r'(?:Broken|Unusable)\(\s*"([a-z0-9_]+)"', code))
    page = PAGE.read_text(encoding="utf-8")
    assert len(reasons) > 25
    assert not [reason for reason in sorted(reasons) if f"`{reason}`" not in page]


@pytest.mark.parametrize("extra", ["documents", "remote", "gcs", "sql", "labels", "augment"])
def test_every_extra_is_there(extra: str) -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert extra in project["optional-dependencies"] and f"[{extra}]" in PAGE.read_text(encoding="utf-8")

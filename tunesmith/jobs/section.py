"""The service's settings: `tunesmith up SETTINGS`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from tunesmith.section import Section


class ServiceSection(Section):
    """What `tunesmith up` starts."""

    home: str = "tunesmith-service"
    """This machine's folder: the database and artifacts if they have no other place, runs in training, logs."""
    database: str | None = None
    """An SQLAlchemy URL; SQLite in `home` if not given. Several machines need postgresql://user@host/name."""
    artifacts: str | None = None
    """Where files and models are kept: any fsspec URL (s3://bucket/folder, gs://...), or a folder; in `home` if not
    given."""
    models: dict[str, str] = {"smollm2-135m-instruct": "smollm2-135m-instruct"}
    """What can be fine-tuned: the name that clients give, and a built-in name, folder, .gguf file or hub id."""
    whole_models: int = Field(2, ge=0)
    """Tuned models that are no plain LoRA and answer at once, each with an engine, and so memory, of its own."""
    workers: int = Field(1, ge=0)
    """Jobs that this machine trains at once; its cores are shared among them."""
    cores: int | None = Field(None, ge=1)
    """Cores of this machine that jobs may take in all; all of them if not given."""
    memory_gib: float | None = Field(None, gt=0)
    """Memory of this machine that jobs may take in all; all of it if not given."""
    jobs_at_once: int | None = Field(None, ge=1)
    """Jobs of one key that may run at the same time, where the key has no limit of its own."""
    lease: float = Field(60.0, gt=0)
    """Seconds after which a worker that gives no sign is taken for dead, and its job goes on elsewhere."""
    attempts: int = Field(5, ge=1)
    """Workers that a job may lose without getting on, before it fails."""
    max_file: int = Field(512 << 20, ge=1024)
    """Largest file in bytes."""
    max_upload: int = Field(8 << 30, ge=1024)
    """Largest file in bytes that comes in parts."""
    private_webhooks: bool = False
    """Let webhooks go to private and loopback addresses."""

    @field_validator("models")
    @classmethod
    def _plain(cls, value: dict[str, str]) -> dict[str, str]:
        wrong = next((name for name in value if not name or ":" in name), None)
        if wrong is not None:
            raise ValueError(f"'{wrong}' can't be a model's name: colons divide the names of tuned models")
        return value

    @property
    def folder(self) -> Path:
        return Path(self.home).expanduser().resolve()

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{self.folder / 'tunesmith.db'}"

"""What the service's parts share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from tunesmith import store as stores
from tunesmith.jobs.artifacts import Artifacts, file_key
from tunesmith.jobs.section import ServiceSection
from tunesmith.store.tables import Model

if TYPE_CHECKING:
    from tunesmith.store.database import Store


@dataclass(frozen=True)
class Service:
    """The settings, opened."""

    settings: ServiceSection
    store: Store
    artifacts: Artifacts

    @property
    def runs(self) -> Path:
        """Where this machine's workers train."""
        return self.settings.folder / "runs"

    @property
    def logs(self) -> Path:
        return self.settings.folder / "logs"

    def file(self, id: str) -> Path:
        """A file's content on this machine."""
        return self.artifacts.path(file_key(id))

    def model(self, name: str) -> Model | None:
        """A tuned model that no gate holds, by its `ft:` name."""
        with self.store.read() as session:
            return session.scalar(sa.select(Model).where(Model.id == name, ~Model.held))

    @property
    def several(self) -> bool:
        """Whether other machines may work here too, which must find a run's folder among the artifacts."""
        return self.store.postgresql or not self.artifacts.local

    def forget(self, *artifacts: str) -> None:
        for key in artifacts:
            self.artifacts.delete(key)


def open_service(settings: ServiceSection) -> Service:
    """Open the database and the place for artifacts.

    Raises:
        MachineError: one of them can't be.
    """
    folder = settings.folder
    folder.mkdir(parents=True, exist_ok=True)
    store = stores.open(settings.database_url)
    return Service(settings, store, Artifacts(settings.artifacts or str(folder / "artifacts"), folder / "cache"))

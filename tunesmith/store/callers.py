"""Who calls, and what they may do. Light: also for servers without a database."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["viewer", "runner", "admin"]
ROLES: tuple[Role, ...] = ("viewer", "runner", "admin")


@dataclass(frozen=True)
class Caller:
    """Who calls.

    Attributes:
        key: the key's id, never the key itself.
        role: viewer sees, runner also asks models, makes and removes, admin also hands out keys.
        scopes: the parts of the service that the key is for; all, if empty.
        rpm, token_quota: requests a minute and tokens in all; None where there is no limit.
    """

    key: str
    project: str
    role: Role
    scopes: frozenset[str] = frozenset()
    rpm: int | None = None
    token_quota: int | None = None

    def may(self, role: Role, scope: str | None = None) -> bool:
        """Whether that role's work, in that part, is allowed."""
        return self.lacks(role, scope) is None

    def lacks(self, role: Role, scope: str | None = None) -> str | None:
        """What the caller lacks for that role's work, in that part; None where nothing."""
        if ROLES.index(self.role) < ROLES.index(role):
            return f"the role {role}"
        return f"the scope {scope}" if scope and self.scopes and scope not in self.scopes else None

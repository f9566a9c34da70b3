"""`data.clean.secrets`: keys, tokens and passwords."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from typing import Any, ClassVar, Literal

from tunesmith.conversation.message import Conversation
from tunesmith.data.clean.personal import in_json
from tunesmith.data.clean.step import RowStep, Verdict, need
from tunesmith.data.clean.texts import map_all

# Whole keys, of which the detector only knows the first line, and issuers that it does not know.
OURS = {
    "Private Key": r"-----BEGIN[A-Z ]*PRIVATE KEY-----.*?(?:-----END[A-Z ]*PRIVATE KEY-----|\Z)",
    "API Key": r"\bsk-(?:[a-z]+-)*[A-Za-z0-9_-]{20,}|\bhf_[A-Za-z0-9]{30,}|\bAIza[A-Za-z0-9_-]{35}"
    r"|\bglpat-[A-Za-z0-9_-]{20,}|\bpypi-[A-Za-z0-9_-]{50,}|\bgithub_pat_[A-Za-z0-9_]{50,}|\bdop_v1_[a-f0-9]{64}",
    "Bearer Token": r"(?<=Bearer )[A-Za-z0-9._~+/-]{20,}=*",
}
LEFT_OUT = ("BasePlugin", "RegexBasedDetector", "HighEntropyStringsPlugin", "PrivateKeyDetector", "IPPublicDetector")
ENTROPY = ("Base64HighEntropyString", "HexHighEntropyString")
FEWEST = 6


class Secrets(RowStep):
    """Find API keys, tokens, passwords and private keys by detect-secrets' detectors. Nothing found is sent anywhere
    to be tried."""

    short: ClassVar[str] = "action"

    action: Literal["report", "mask", "drop"] = "drop"
    """report: count, and list the rows; mask: write [SECRET] in its place; drop: leave the row out."""
    entropy: bool = False
    """Take any long random string in quotes for a secret, too. Hashes and ids are random as well."""

    def look(self, row: Conversation) -> Verdict:
        found: list[str] = []

        def note(text: str) -> str:
            found.extend(kind for kind, _ in self._find(text))
            return text

        map_all(row, note)
        if not found:
            return Verdict(row)
        counted = dict(Counter(found))
        why = "holds " + ", ".join(counted)
        if self.action == "report":
            return Verdict(row, why, counted)
        return Verdict(None if self.action == "drop" else map_all(row, self.hide), why, counted)

    def hide(self, text: str) -> str:
        return text if self.action == "report" else in_json(text, self._masked)

    def _masked(self, text: str) -> str:
        for _, secret in sorted(self._find(text), key=lambda s: -len(s[1])):
            text = text.replace(secret, "[SECRET]")
        return text

    def _find(self, text: str) -> list[tuple[str, str]]:
        found = {m.group(): kind for kind, pattern in OURS.items() for m in re.finditer(pattern, text, re.DOTALL)}
        for line in text.splitlines():
            for detector in detectors(self.entropy):
                for secret in _secrets(detector, line):
                    if len(secret) >= FEWEST and secret != "[SECRET]":
                        found.setdefault(secret, detector.secret_type)
        whole = [s for s in found if not any(s != other and s in other for other in found)]
        return [(found[secret], secret) for secret in whole]


def _secrets(detector: Any, line: str) -> list[str]:
    """What a detector finds in a line; of a pattern the whole match, not the groups in it."""
    if hasattr(detector, "denylist"):
        return [m.group() for pattern in detector.denylist for m in pattern.finditer(line)]
    return list(detector.analyze_string(line))


@cache
def detectors(entropy: bool) -> list[Any]:
    """detect-secrets' detectors; of those by entropy, both or none."""
    plugins = need("detect_secrets.core.plugins.util", "secrets").get_mapping_from_secret_type_to_class()
    chosen = [p for p in plugins.values() if p.__name__ not in LEFT_OUT]
    return [p() for p in chosen if entropy or p.__name__ not in ENTROPY]

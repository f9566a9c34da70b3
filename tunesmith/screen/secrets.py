"""Keys, tokens and passwords in a text."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from tunesmith.screen.inside import Cut
from tunesmith.screen.library import need

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
MARK = "[SECRET]"


def secrets(text: str, entropy: bool = False) -> list[tuple[str, str]]:
    """The secrets in a text, with their kinds."""
    found = {m.group(): kind for kind, pattern in OURS.items() for m in re.finditer(pattern, text, re.DOTALL)}
    for line in text.splitlines():
        for detector in detectors(entropy):
            for secret in _secrets(detector, line):
                if len(secret) >= FEWEST and secret != MARK:
                    found.setdefault(secret, detector.secret_type)
    whole = [s for s in found if not any(s != other and s in other for other in found)]
    return [(found[secret], secret) for secret in whole]


def secret_cuts(text: str, entropy: bool = False) -> list[Cut]:
    """Where secrets stand, wherever they stand again, in order; [SECRET] belongs there."""
    found = [s for _, s in secrets(text, entropy)]
    return sorted((m.start(), m.end(), MARK) for s in found for m in re.finditer(re.escape(s), text))


def _secrets(detector: Any, line: str) -> list[str]:
    """What a detector finds in a line; of a pattern the whole match, not the groups in it."""
    if hasattr(detector, "denylist"):
        return [m.group() for pattern in detector.denylist for m in pattern.finditer(line)]
    return list(detector.analyze_string(line))


@cache
def detectors(entropy: bool) -> list[Any]:
    """detect-secrets' detectors; of those by entropy, both or none."""
    plugins = need("detect_secrets.core.plugins.util", "data.clean.secrets").get_mapping_from_secret_type_to_class()
    chosen = [p for p in plugins.values() if p.__name__ not in LEFT_OUT]
    return [p() for p in chosen if entropy or p.__name__ not in ENTROPY]

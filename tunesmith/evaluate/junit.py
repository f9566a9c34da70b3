"""JUnit XML of a gate's conditions and a suite's cases, for what shows test results."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree as xml


def junit(name: str, card: dict[str, Any]) -> str:
    """A test case for each condition (failed where it is not met) and each golden case."""
    cases: list[tuple[str, str, str | None, str]] = [
        ("gate", c["condition"], None if c["met"] else c["state"], c["why"]) for c in card["gate"]["conditions"]
    ]
    for case in card.get("suite", {}).get("cases", []):
        cases.append(("suite", case["name"], None if case["passed"] else "failed", case["why"]))
    failed = sum(state is not None for _, _, state, _ in cases)
    root = xml.Element("testsuites", name=name, tests=str(len(cases)), failures=str(failed))
    suite = xml.SubElement(root, "testsuite", name=name, tests=str(len(cases)), failures=str(failed))
    for kind, case_name, state, why in cases:
        case = xml.SubElement(suite, "testcase", classname=f"{name}.{kind}", name=case_name)
        if state is not None:
            xml.SubElement(case, "failure", type=state, message=why)
        else:
            xml.SubElement(case, "system-out").text = why
    xml.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + xml.tostring(root, encoding="unicode") + "\n"

"""What the doctor says about one thing."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum


class Severity(IntEnum):
    """As in the API (`migrator.v1.Severity`)."""

    OK = 1
    WARNING = 2
    PROBLEM = 3


@dataclass(frozen=True)
class Finding:
    """`subject` is stable; `remedy` says what to do about it and is empty if there is nothing to do."""

    subject: str
    severity: Severity
    message: str
    remedy: str = ""


def ok(subject: str, message: str) -> Finding:
    """It is there and works."""
    return Finding(subject, Severity.OK, message)


def warning(subject: str, message: str, remedy: str) -> Finding:
    """Containers run and move, but less well."""
    return Finding(subject, Severity.WARNING, message, remedy)


def problem(subject: str, message: str, remedy: str) -> Finding:
    """Something that the host is for does not work."""
    return Finding(subject, Severity.PROBLEM, message, remedy)


def as_json(findings: Iterable[Finding]) -> str:
    """As the command line prints what the API returns."""
    return json.dumps(
        [
            {"subject": f.subject, "severity": f.severity.name.lower(), "message": f.message, "remedy": f.remedy}
            for f in findings
        ],
        indent=2,
    )

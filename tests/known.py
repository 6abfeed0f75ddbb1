"""What still breaks a rule, by rule. A list here may only get shorter: what is mended must be taken out, and nothing comes in."""

KNOWN: dict[str, set[str]] = {}
# how often a rule that counts is broken
COUNTS = {
    "retired": {"facts": 3},
    "long names": 0,
    "private reads": 17,
    "private reads of code": 0,
}


def refuse(rule: str, violations: dict[str, str]) -> None:
    """Fail with the message of every violation that is not known, and of every known one that is gone."""
    known = KNOWN.get(rule, set())
    fresh = [violations[key] for key in sorted(violations.keys() - known)]
    assert not fresh, "\n" + "\n".join(fresh)
    mended = sorted(known - violations.keys())
    assert not mended, f"mended, take out of KNOWN in tests/known.py under {rule!r}: {mended}"

"""The shipped prompt sets keep to their rules: no template and no run of eight words in two of them, nothing reserved."""

import subprocess
import sys
from itertools import combinations

import pytest

from specl.shared import prompts


def runs_of_eight(text):
    """Counted here again, by words between spaces, so that the checker is not its own witness."""
    words = text.lower().split()
    return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}


@pytest.mark.process
def test_the_checker_finds_nothing_wrong():
    folder = prompts.path_of("train").parent
    done = subprocess.run([sys.executable, "check.py"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "passed (0 problems)" in done.stdout, done.stdout[-1500:]


@pytest.mark.parametrize(("one", "other"), list(combinations(prompts.SETS, 2)))
def test_no_two_sets_share_eight_words(one, other):
    found = []
    for name in (one, other):
        texts = (message["content"] for prompt in prompts.load(name) for message in prompt.messages)
        found.append(set().union(*map(runs_of_eight, texts)))
    assert found[0] and found[1]
    assert not found[0] & found[1]

"""Words and manners: retired identifiers stay retired, test names are short claims, tests read no private attribute and no clock."""

import ast
import re
from functools import cache

from tests.source_tree import EXAMPLES, FILES, ROOT, TEST_FILES, functions, identifiers, name, tree

# words of a dialect that the field's terms replaced; docs/glossary.md has those in use
RETIRED_WORDS = {
    "blot", "complain", "consent", "discretion", "fact", "facts", "gatherer",
    "impatient", "insist", "keeper", "law", "laws", "lent", "lookout", "misfit", "misfits",
    "notebook", "overtaken", "politeness", "relent", "seat", "seats", "spoils",
    "stopper", "teller", "told", "turnstile", "wish", "wished", "wishes", "zygote",
}  # fmt: skip
RETIRED_NAMES = {
    "at_once", "broken_off", "check_room", "crash_point", "forget_typed", "house", "last_words",
    "nothing_known", "only_spoils", "own_answers", "own_drafter", "own_drafters", "own_loss",
    "own_names", "past_answers", "pass_through", "raise_it", "second_look", "second_looks",
    "step_back",
}  # fmt: skip
LONGEST_TEST_NAME, PRIVATE_READS, GLOSSARY = 8, 30, 40
# public under such a name: os._exit, SQLAlchemy's row._mapping; mlx takes an attribute of a module for a weight unless it begins so
PUBLIC = {"_exit", "_Environ", "_mapping", "_packed", "_stack"}
SOURCES = [path for path in (*FILES, *TEST_FILES, *EXAMPLES) if path.name != "test_names.py"]


@cache
def snake(identifier):
    """`TokenLaw` and `token_law` as token_law."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", identifier).lower().strip("_")


def retired_in(identifier):
    """The retired words in an identifier, and itself where it is retired as a whole."""
    words = snake(identifier)
    return sorted(RETIRED_WORDS & set(words.split("_")) | RETIRED_NAMES & {words})


def test_retired_identifiers_stay_retired():
    found = [f"{name(path)} {word}" for path in SOURCES for word in identifiers(path) if retired_in(word)]
    assert not found, "\n".join(found)


def test_test_names_are_short_claims():
    names = [node.name for path in TEST_FILES for node in functions(path) if node.name.startswith("test_")]
    long = [name for name in names if len(name.removeprefix("test_").split("_")) > LONGEST_TEST_NAME]
    assert not long, "\n".join(long)


def private_reads(path):
    """Reads of `x._name` where x is neither self nor cls."""
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
            continue
        if node.attr in PUBLIC:
            continue
        if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
            yield f"{name(path)}:{node.lineno} {ast.unparse(node)}"


def test_few_tests_read_private_attributes():
    reads = [read for path in TEST_FILES for read in private_reads(path)]
    assert len(reads) <= PRIVATE_READS, "\n".join(reads)


def test_no_code_reads_anothers_private_attributes():
    reads = [read for path in (*FILES, *EXAMPLES) for read in private_reads(path)]
    assert not reads, "\n".join(reads)


def test_the_glossary_is_short():
    rows = re.findall(r"^\| (?!word \||-)", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    assert 0 < len(rows) <= GLOSSARY


def durations_asserted(path):
    """Assertions on how long something took by the wall clock: a busy machine fails them. Limits belong into `wait_until` or a timeout."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Assert) and re.search(r"(monotonic|perf_counter)\(\) - ", ast.unparse(node)):
            yield f"{name(path)}:{node.lineno}"


def test_no_assertion_measures_time():
    assert not [place for path in TEST_FILES if "bench" not in path.parts for place in durations_asserted(path)]

"""Documents say what is true: the code map names functions that exist, links lead to files."""

import ast
import re

import pytest

from tests.fakes import ROOT

CODE_MAP = ROOT / "docs" / "code-map.md"
PLACES = sorted(set(re.findall(r"`([\w/]+\.py):(\w+)`", CODE_MAP.read_text(encoding="utf-8"))))
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def defined_in(path):
    """Names of the functions, methods and classes of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    }


@pytest.mark.parametrize(("file", "name"), PLACES)
def test_code_map_names_existing_functions(file, name):
    assert name in defined_in(ROOT / file)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing


def test_readme_is_at_most_150_lines():
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") <= 150

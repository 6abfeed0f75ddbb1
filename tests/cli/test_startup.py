"""What a command loads before it does anything. Modules are counted: they are what start-up costs, and a busy machine does not
change their number.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from specl.shared.errors import ConfigError
from specl.shared.paths import find_paths
from specl.shared.settings import cache
from specl.shared.settings.load import load_settings

CODE = """
import json, sys
from specl.cli.main import main
try:
    main({arguments!r})
except SystemExit:
    pass
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""
NEVER = {"sqlalchemy", "mlx", "numpy", "asyncio", "structlog", "starlette", "prompt_toolkit", "transformers"}
READERS = {"pydantic", "ruamel"}  # once for each settings file; after that what they found is remembered


def loaded(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(arguments=list(arguments))],
        env=os.environ | environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return set(json.loads(done.stderr.splitlines()[-1])), done.stdout


@pytest.fixture
def instance(new_instance):
    """One of its own: the other commands' tests share one."""
    return new_instance()


def test_status_with_daemons_up_loads_no_database_library(instance):
    instance.start("collector")
    instance.ready("collector")
    instance.start("inference")
    instance.ready("inference")
    modules, said = loaded("status", "--json", **instance.environment())
    assert json.loads(said)["collector"]["state"] == "ready"
    assert not modules & NEVER and "rich" not in modules and len(modules) < 380
    modules, said = loaded("status", "--json", **instance.environment())
    assert json.loads(said)["inference"]["state"] == "ready"
    assert not modules & (NEVER | READERS | {"rich"}) and len(modules) < 260
    modules, said = loaded("status", **instance.environment())
    assert "collector" in said and not modules & (NEVER | READERS) and len(modules) < 340


def test_status_with_daemons_down_and_nothing_stored_loads_none_either():
    modules, _ = loaded("status", "--json")
    assert not modules & NEVER and len(modules) < 380


def test_ask_loads_what_it_sends_with():
    find_paths().create()
    loaded("ask", "hello")
    modules, _ = loaded("ask", "hello")
    assert "zmq" in modules and not modules & (NEVER | READERS | {"rich"}) and len(modules) < 260


def test_remembered_settings_are_those_of_the_file_and_follow_it(tmp_path, monkeypatch):
    paths, file = find_paths().create(), tmp_path / "settings.yaml"
    monkeypatch.setenv("SPECL_CONFIG", str(file))
    for text in (
        "speculative: {temperature: 0.25, max_tokens: 11}\ngateway: {hosts: [here], token: 0123456789abcdef0123}\n",
        "speculative: {temperature: 1}\n",
    ):
        file.write_text(text)
        known = load_settings(file).model_dump(mode="json")
        first, again = cache.load_cached_settings(paths), cache.load_cached_settings(paths)
        assert first.model_dump(mode="json") == known and not hasattr(again, "model_dump")
        assert known["gateway"].pop("token", None) is None or "0123456789abcdef" not in memory(paths).read_text()
        assert plain(again) == known and memory(paths).stat().st_mode & 0o077 == 0
    file.write_text("speculative: {temperature: warm}\n")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"settings.yaml:1"):
            cache.load_cached_settings(paths)
    memory(paths).write_text("not json")
    file.write_text("{}")
    assert cache.load_cached_settings(paths) == load_settings(file)


def memory(paths):
    return paths.run / "settings.json"


def plain(tree):
    return {name: plain(value) for name, value in vars(tree).items()} if isinstance(tree, SimpleNamespace) else tree

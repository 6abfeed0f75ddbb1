"""Commands that load models of their own look for room first, beside what the daemons hold; and a
disk without any.
"""

import errno

import pytest

from specl.cli import eval as eval_command
from specl.cli import memory_check
from specl.cli.chat import chat_input
from specl.shared.errors import ModelError
from specl.shared.paths import find_paths
from specl.shared.runtime.locks import Lock
from specl.shared.settings.load import load_settings
from specl.shared.settings.schema import Settings


@pytest.fixture
def use(tmp_path, monkeypatch, stored):
    def use(limit):
        target = stored().path
        text = f"models: {{target: {{name: {target}}}, draft: {{name: null}}}}\nmemory: {{limit_gb: {limit}}}\n"
        (tmp_path / "s.yaml").write_text(text)
        monkeypatch.setenv("SPECL_CONFIG", str(tmp_path / "s.yaml"))
        return target

    return use


def test_the_daemons_copy_counts_while_they_run(use):
    target = use(0.5)
    settings, paths = load_settings(), find_paths().create()
    memory_check.check_memory(settings, paths, target, None, "this")
    lock = Lock(paths.run, "inference")
    with pytest.raises(
        ModelError, match=r"this needs about 0\.\d GB beside the 0\.\d GB of the running daemons; 0\.5 GB"
    ):
        memory_check.check_memory(settings, paths, target, None, "this")
    lock.release()


def test_commands_refuse_before_loading_without_memory(use, specl, tmp_path):
    use(0.01)
    (tmp_path / "i.jsonl").write_text('{"prompt": "a", "target_output": "b"}\n')
    for arguments in (
        ("store", "import", "--jsonl", tmp_path / "i.jsonl"),
        ("draft", "build", "--out", tmp_path / "made"),
    ):
        outcome = specl(*arguments)
        assert outcome.exit_code == 2 and "0.0 GB may be taken" in outcome.stderr, outcome.stderr
    assert not (tmp_path / "made").exists()
    with pytest.raises(ModelError, match="loading the models a second time needs"):
        eval_command._load()
    assert specl("store", "import", "--jsonl", tmp_path / "i.jsonl", "--text-only").exit_code == 0


def test_a_full_disk_ends_remembering_not_talking(tmp_path, monkeypatch, capsys):
    from prompt_toolkit.history import FileHistory

    history = chat_input.open_history(find_paths().create(), Settings().records, remember=True)
    history.append_string("first")

    def full(self, string):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FileHistory, "store_string", full)
    for text in ("second", "third"):
        history.append_string(text)
    assert capsys.readouterr().err.count("not remembered any more") == 1
    assert history.get_strings()[-2:] == ["second", "third"]

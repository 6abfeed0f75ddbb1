"""`specl-ctl doctor` on ports, locks, disk and the model cache: what it says and what to do."""

import socket

import pytest

from specl.cli.doctor import (
    BAD,
    check_access,
    check_costs,
    check_folders,
    check_plugins,
    check_ports,
    device_finding,
    examine,
)
from specl.shared.paths import find_paths
from specl.shared.runtime.locks import Lock


@pytest.fixture
def taken():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


@pytest.fixture
def use(tmp_path, monkeypatch):
    def use(text):
        (tmp_path / "settings.yaml").write_text(text)
        monkeypatch.setenv("SPECL_CONFIG", str(tmp_path / "settings.yaml"))
        monkeypatch.delenv("SPECL_MODELS", raising=False)  # one test puts a model into the folder
        find_paths().create()

    return use


def test_port_taken_by_another_program_names_its_setting(use, taken):
    use(f"gateway: {{port: {taken}}}\n")
    ((level, _, text),) = check_ports()
    assert level == "warn" and str(taken) in text and "set gateway.port" in text


def test_a_port_of_our_own_gateway_is_fine(use, taken):
    use(f"gateway: {{port: {taken}}}\n")
    lock = Lock(find_paths().run, "gateway")
    assert [(level, text.split()[-1]) for level, _, text in check_ports()] == [("ok", "ours")]
    lock.release()


def test_tcp_checks_all_six_ports(use, taken):
    use(f"gateway: {{enabled: false}}\nbus: {{transport: tcp, port: {taken - 2}}}\n")
    levels = [level for level, _, _ in check_ports()]
    assert len(levels) == 6 and levels[2] == "bad"


def test_locks_disk_and_model_cache_are_reported(use):
    use("gateway: {enabled: false}\n")
    model = find_paths().models / "a-model"
    model.mkdir(parents=True, exist_ok=True)
    (model / "weights").write_bytes(bytes(200_000))
    texts = {name: text for _, name, text in check_folders()}
    assert "GiB free" in texts["disk"] and "honcho start" in texts["inference"] and "gateway" not in texts
    assert texts["models"].startswith("1 folders, 0.0 GB")


# ------------------------------------------------------------------------------- what stops daemons
def bad(*checks):
    return [text for level, _, text in examine(checks) if level == BAD]


@pytest.mark.parametrize(
    ("text", "token", "message"),
    [
        ("gateway: {host: 0.0.0.0}", "", "beyond loopback, which needs"),
        ("gateway: {host: 0.0.0.0, allow_remote: true}", "", "needs a gateway.token"),
        ("{}", "short", "less than 16 characters"),
        ("bus: {transport: tcp, host: 192.0.2.1}", "", "there are no keys in"),
    ],
)
def test_settings_error_shows_the_daemons_sentence(use, monkeypatch, text, token, message):
    use(text + "\n")
    monkeypatch.setenv("SPECL_GATEWAY_TOKEN", token)
    (found,) = bad(check_access)
    assert message in found


def test_a_gateway_that_is_switched_off_exposes_nothing(use):
    use("gateway: {host: 0.0.0.0, enabled: false}\n")
    assert bad(check_access) == []


@pytest.mark.parametrize(
    "text", ["speculative: {drafter: 'no_such_module:make'}\n", "training: {loss: {type: 'json:no_such_loss'}}\n"]
)
def test_plugins_that_cannot_be_imported_are_bad(use, text):
    use(text)
    (found,) = bad(check_plugins)
    assert "speculative.drafter" in found or "training.loss.type" in found


def test_hook_in_this_folder_is_found(use, tmp_path, monkeypatch):
    use("speculative: {drafter: 'doctors_plugin:make'}\n")
    (tmp_path / "doctors_plugin.py").write_text("def make(target, draft): ...\n")
    monkeypatch.chdir(tmp_path)
    assert [(level, text) for level, _, text in check_plugins()] == [("ok", "speculative.drafter: doctors_plugin:make")]


@pytest.mark.parametrize("content", ['{"verify": {"1": 0.0', "[]", '{"verify": {"1": "x"}, "draft": {}}', "\xff"])
def test_truncated_costs_file_is_reported(use, content):
    use("{}\n")
    (find_paths().costs / "a.json").write_bytes(content.encode("latin-1"))
    ((level, _, text),) = check_costs()
    assert level == "warn" and "cannot be read" in text


def test_failing_check_is_a_row_others_run(use):
    def check_broken():
        yield "ok", "first", "fine"
        raise RuntimeError("broken library")

    def check_after():
        yield "ok", "after", "fine"

    found = list(examine([check_broken, check_after]))
    assert [(level, name) for level, name, _ in found] == [("ok", "first"), ("bad", "broken"), ("ok", "after")]
    assert "RuntimeError: broken library" in found[1][2]


def test_mac_on_its_cpu_is_reported_as_bad():
    assert device_finding("Linux", "cpu") == ("ok", "device", "cpu")
    assert device_finding("Darwin", "gpu")[0] == "ok" and "Metal" in device_finding("Darwin", "gpu")[2]
    level, _, text = device_finding("Darwin", "cpu")
    assert level == "warn" and "Metal" in text and "arm64" in text


def test_machines_read_json(use, specl):
    use("gateway: {host: 0.0.0.0}\n")
    outcome = specl("doctor", "--json")
    assert outcome.exit_code == 1 and outcome.json["ok"] is False
    assert {"machine", "device", "access"} <= {finding["name"] for finding in outcome.json["findings"]}
    assert all(set(finding) == {"level", "name", "text"} for finding in outcome.json["findings"])

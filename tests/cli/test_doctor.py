"""`specl-ctl doctor` on ports, locks, disk and the model cache: what it says and what to do."""

import socket

import pytest

from specl.cli.doctor import _folders, _ports
from specl.shared.paths import find_paths
from specl.shared.process import Lock


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
        find_paths().create()

    return use


def test_a_port_of_another_program_is_named_with_its_setting(use, taken):
    use(f"gateway: {{port: {taken}}}\n")
    ((level, _, said),) = _ports()
    assert level == "warn" and str(taken) in said and "set gateway.port" in said


def test_a_port_of_our_own_gateway_is_fine(use, taken):
    use(f"gateway: {{port: {taken}}}\n")
    lock = Lock(find_paths().run, "gateway")
    assert [(level, said.split()[-1]) for level, _, said in _ports()] == [("ok", "ours")]
    lock.release()


def test_tcp_looks_at_all_six_ports_of_the_bus(use, taken):
    use(f"gateway: {{enabled: false}}\nbus: {{transport: tcp, port: {taken - 2}}}\n")
    levels = [level for level, _, _ in _ports()]
    assert len(levels) == 6 and levels[2] == "bad"


def test_locks_disk_and_the_model_cache_are_told(use):
    use("gateway: {enabled: false}\n")
    model = find_paths().models / "a-model"
    model.mkdir(parents=True, exist_ok=True)
    (model / "weights").write_bytes(bytes(200_000))
    said = {name: text for _, name, text in _folders()}
    assert "GiB free" in said["disk"] and "honcho start" in said["inference"] and "gateway" not in said
    assert said["models"].startswith("1 folders, 0.0 GB")

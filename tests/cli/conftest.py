"""A store with known rows, the command line in this process, and stand-ins for daemons that tests talk to."""

import json
import sys

import pytest
from click.testing import CliRunner

from specl.cli.main import main
from specl.shared.paths import find_paths
from specl.shared.store import Store
from tests.fakes import make_disagreement, make_generation, to_row
from tests.harness.instance import Instance


@pytest.fixture
def specl():
    """`specl(*arguments, input=...)`: the command line as a process would run it; has exit_code, stdout, stderr. With `color`
    a terminal is there.
    """

    def run(*arguments, input=None, color=False):
        runner = CliRunner()
        with runner.isolation(input=input, color=color) as (out, err, _):
            code = 0
            try:
                main([str(argument) for argument in arguments])
            except SystemExit as exit:
                code = exit.code or 0
            sys.stdout.flush()
            stdout, stderr = out.getvalue().decode(), err.getvalue().decode()
        return Outcome(code, stdout, stderr)

    return run


class Outcome:
    def __init__(self, exit_code, stdout, stderr):
        self.exit_code, self.stdout, self.stderr = exit_code, stdout, stderr

    @property
    def json(self):
        return json.loads(self.stdout)

    @property
    def lines(self):
        return [json.loads(line) for line in self.stdout.splitlines()]


@pytest.fixture
def filled():
    """Ten generations: odd ones are failures, the later the worse; number 7 speaks of SELECT."""
    store = Store(find_paths().create().store)
    store.set_threshold(0.5)
    records = []
    for n in range(10):
        rate = 0.45 - 0.03 * n if n % 2 else 0.8
        changes = {
            "acceptance_rate": rate,
            "created_at": 1_790_000_000.0 + 3600 * n,
            "adapter_id": "000002" if n > 5 else "",
        }
        changes["messages"] = [{"role": "user", "content": "SELECT a row" if n == 7 else f"question {n}"}]
        changes["disagreements"] = [make_disagreement(place) for place in range(n)]
        records.append(make_generation(f"{n:02}abcdef", **changes))
    store.add_rows([to_row(record) for record in records])
    store.close()
    return records


@pytest.fixture(scope="session")
def stored(tmp_path_factory):
    """A target on disk: a random model with a tokenizer."""
    from tests.stored import write_target

    model = write_target(tmp_path_factory.mktemp("models") / "target", tied=True, quantised=False)
    return lambda: model


@pytest.fixture(scope="session")
def running(forkserver):
    """A run directory with real inference and collector daemons around a random one-layer model."""
    with Instance(forkserver) as instance:
        for role in ("inference", "collector"):
            instance.start(role, SPECL_TEST_TOKEN_MS="15")  # slow enough to be interrupted
        for role in ("inference", "collector"):
            instance.ready(role)
        yield instance


@pytest.fixture
def instance(running, monkeypatch):
    """`running`, as the run directory that this process's commands use."""
    monkeypatch.setenv("SPECL_VAR", str(running.folder))
    monkeypatch.setenv("SPECL_CONFIG", str(running.file))
    return running

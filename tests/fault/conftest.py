import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def deaths(tmp_path_factory):
    """The file in which whoever dies at a named crash point, in any test of this session, writes that name."""
    file = tmp_path_factory.mktemp("deaths") / "points"
    file.touch()
    os.environ["SPECL_CRASH_NOTE"] = str(file)  # every instance hands it to its daemons
    yield file
    del os.environ["SPECL_CRASH_NOTE"]


@pytest.fixture
def figures(record_property, capsys):
    """Print a line of measured figures, whatever pytest captures."""

    def say(**values):
        text = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        for name, value in values.items():
            record_property(name, value)
        with capsys.disabled():
            print(f"\n    {text}", flush=True)

    return say


@pytest.fixture
def proxied():
    """`proxied(instance, drop, double)`: a LossyProxy."""
    from tests.harness.proxy import LossyProxy

    made = []

    def make(instance, **faults):
        made.append(LossyProxy(instance, **faults))
        return made[-1]

    yield make
    for proxy in made:
        proxy.close()


def pytest_collection_modifyitems(items):
    """Faults take minutes and a machine of their own: the slow tier."""
    for item in items:
        if "tests/fault" in str(item.path):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: "every_failpoint" in item.name)  # it looks back on all others

"""What tests here share."""

import pytest

from tests.stored import write_target


@pytest.fixture(scope="session")
def stored(tmp_path_factory):
    """Targets by (tied, quantised), made once."""
    made = {}

    def make(tied=True, quantised=False):
        key = (tied, quantised)
        if key not in made:
            made[key] = write_target(tmp_path_factory.mktemp("models") / "target", *key)
        return made[key]

    return make

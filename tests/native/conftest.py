"""Tests of the native Linux-CPU kernels; skipped, with the reason, where the extension cannot be used."""

import pytest

from specl.shared import native


def pytest_collection_modifyitems(items):
    if native.available():
        return
    skip = pytest.mark.skip(reason=f"native kernels: {native.reason()}")
    for item in items:
        if "tests/native" in str(item.path) and "without_the_extension" not in item.name:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def best_instruction_set():
    """Each test starts and ends on the machine's own kernels and threads."""
    yield
    if native.available():
        native.use_instruction_set(native.instruction_sets()[0])
        native.set_threads(0)


def pytest_generate_tests(metafunc):
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", native.instruction_sets() if native.available() else ["none"])


@pytest.fixture
def language_model():
    """A factory of tiny random targets as the loader gives them."""
    from specl.shared.models.cpu_kernels import Kernels
    from specl.shared.models.language_model import LanguageModel
    from tests.native.test_model import SIZES, tiny

    def make(**changes):
        model = tiny(**changes)
        assert native.accelerate(model).fused
        shape = SIZES | changes
        return LanguageModel(
            "tiny", None, model, None, shape, "tiny", "tiny-tokens", {}, Kernels("native", one_call=True)
        )

    return make

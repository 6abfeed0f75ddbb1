"""Where the extension is missing, foreign, wrong or not wanted: the ordinary path and at most one warning."""

import os
import subprocess
import sys
import warnings

import mlx.core as mx
import mlx.nn as nn
import pytest

from specl.shared import native
from specl.shared.native import extension


@pytest.fixture
def undecided():
    """The decision is made afresh inside the test and again after it."""
    extension.load_extension.cache_clear()
    yield
    extension.load_extension.cache_clear()


class ExternalAdapter:
    """An extension that looks right and is not."""

    mlx_version = mx.__version__

    def __init__(self, **changes):
        self.__dict__.update(changes)

    def __getattr__(self, name):
        def refuse(*args):
            raise TypeError(f"{name}(): incompatible function arguments")

        return {"isa": lambda: "avx2", "isas": lambda: ["avx2"], "use_isa": lambda name: name == "avx2"}.get(
            name, refuse
        )


def load(monkeypatch, module):
    def give(name):
        if module is None:
            raise ModuleNotFoundError(name)
        return module

    monkeypatch.setattr(extension.importlib, "import_module", give)
    monkeypatch.setattr(extension.sys, "platform", "linux")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [native.available() for _ in range(3)]
    assert not any(found)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (None, "not built"),
        (ExternalAdapter(mlx_version="0.1.0"), "built for mlx 0.1.0"),
        (ExternalAdapter(), "self-test (pack_float"),
    ],
    ids=["missing", "other mlx", "foreign abi"],
)
def test_without_the_extension_one_warning_names_the_remedy(monkeypatch, undecided, module, words):
    warned = load(monkeypatch, module)
    assert len(warned) == 1 and words in warned[0] and "reinstall" in warned[0]
    assert words in native.reason()


def test_without_the_extension_a_model_is_left_alone(monkeypatch, undecided):
    monkeypatch.setenv("SPECL_NATIVE", "0")
    layer = nn.Linear(64, 64)
    got = native.accelerate(layer)
    assert not got.active and "SPECL_NATIVE" in got.reason and type(layer) is nn.Linear
    assert got.refresh().active is False
    got.release()


@pytest.mark.process
def test_disabled_extension_is_not_imported():
    code = "import sys, specl.shared.native as n; n.available(); print('specl.shared.native._native' in sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "SPECL_NATIVE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == "False" and ran.stderr == ""


def test_a_wrong_product_turns_the_extension_off(monkeypatch, undecided):
    right = extension.native()
    extension.load_extension.cache_clear()

    class Wrong(ExternalAdapter):
        def __getattr__(self, name):
            return (lambda x, w: right.linear(x, w) * 1.01) if name == "linear" else getattr(right, name)

    warned = load(monkeypatch, Wrong())
    assert len(warned) == 1 and "self-test (f32 product" in warned[0]


def test_a_model_that_differs_is_given_back(monkeypatch):
    from tests.native.test_model import tiny

    right = extension.native().linear
    model = tiny()
    monkeypatch.setattr(extension.native(), "linear", lambda x, w, b=None: right(x, w, b) * 1.1)
    with pytest.warns(RuntimeWarning, match="differs"):
        got = native.accelerate(model)
    assert not got.active
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear and type(model.model).__name__ == "LlamaModel"


def test_threads_can_be_set_and_reset():
    native.set_threads(3)
    assert native.threads() == 3
    native.set_threads(0)
    assert native.threads() == len(os.sched_getaffinity(0))
    with pytest.raises(ValueError, match="negative"):
        native.set_threads(-1)


def test_an_unknown_instruction_set_is_refused_by_name():
    with pytest.raises(ValueError, match="no avx9000"):
        native.use_instruction_set("avx9000")


def test_idle_threads_use_no_processor():
    import time

    native.set_threads(4)
    packed = extension.native().pack_float(mx.random.normal((4096, 576)), "bf16")
    mx.eval(extension.native().linear(mx.ones((1, 576)), packed))
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1

"""No test touches a user's run directory; a tiny random Llama stands in where truth does not need a real model."""

import os
import signal
import subprocess

import pytest

from specl.shared.models import blas  # noqa: F401 - binds the BLAS before mlx loads

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a suite in the background of a shell without job control inherits this, and so would every process that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)


PROCESS_FIXTURES = {"forkserver", "cli_instance", "system"}  # whoever asks for these starts processes


def pytest_collection_modifyitems(items):
    """Tests whose fixtures start processes need no marker of their own; slow ones are no part of the fast tier either."""
    for item in items:
        if PROCESS_FIXTURES & set(getattr(item, "fixturenames", ())) or item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.process)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """The home folder of every test: none can touch that of the user who runs them."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _folders_of_the_test(tmp_path, home):
    """A run directory for each test."""
    # a context of its own: asking for `monkeypatch` here would make every test's patches outlive its other fixtures
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("SPECL_VAR", str(tmp_path / "var"))
        for name in (
            "SPECL_CONFIG",
            "SPECL_CRASH_AT",
            "XDG_CONFIG_HOME",
            "XDG_DATA_HOME",
            "XDG_CACHE_HOME",
            "XDG_STATE_HOME",
        ):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(autouse=True)
def _no_process_without_the_marker(request):
    """`pytest -m "not process"` is the fast tier: a test that starts a process has to say so."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("process") is None:

            def refuse(*arguments, **more):
                raise AssertionError("this test starts a process: mark it `@pytest.mark.process`")

            patch.setattr(subprocess.Popen, "__init__", refuse)
            patch.setattr(os, "fork", refuse)
        yield


def tiny_model(seed=0, family="llama", vocabulary=97, layers=2, sharp=3.0):
    """A random model of a few thousand weights as a LanguageModel; its head is scaled so that laws are not flat."""
    import importlib

    import mlx.core as mx

    from specl.shared.models.language_model import LanguageModel

    module = importlib.import_module(f"mlx_lm.models.{family}")
    shape = {
        "model_type": family, "hidden_size": 64, "num_hidden_layers": layers, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": vocabulary, "rope_theta": 10000.0,
        "max_position_embeddings": 256, "tie_word_embeddings": False,
    }  # fmt: skip
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(shape))
    model.lm_head.weight = model.lm_head.weight * sharp
    mx.eval(model.parameters())

    class NoTokenizer:
        def __init__(self):
            self.eos_token_ids = {3}

        def decode(self, tokens, **more):
            return "".join(chr(97 + token % 26) for token in tokens)

    return LanguageModel("tiny", None, model, NoTokenizer(), shape, f"tiny-{seed}-{family}", "tiny-tokens")


@pytest.fixture(scope="session")
def tiny():
    """The factory `tiny_model`, cached."""
    made = {}

    def make(**options):
        key = tuple(sorted(options.items()))
        if key not in made:
            made[key] = tiny_model(**options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def forkserver():
    """The process that forks daemons, one for all tests."""
    from tests.harness.forkserver import Forkserver

    server = Forkserver()
    yield server
    server.close()


@pytest.fixture
def new_instance(forkserver):
    """`new_instance()`: a run directory for daemons; what runs in it ends with the test."""
    from tests.harness.instance import Instance

    instances = []

    def make(*settings):
        instances.append(Instance(forkserver, *settings))
        return instances[-1]

    yield make
    for instance in instances:
        instance.close()


@pytest.fixture
def instance(new_instance):
    """A run directory with no daemon yet; see tests/harness/instance.py."""
    return new_instance()

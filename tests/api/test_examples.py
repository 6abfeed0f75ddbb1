"""Every file in examples/ runs as it stands, and the hooks are reached through the settings."""

import os
import subprocess
import sys

import pytest

from specl.shared.errors import ConfigError
from specl.shared.settings.load import parse_settings
from tests.fakes import ROOT

EXAMPLES = ROOT / "examples"


def run(name, *arguments):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, arguments)],
        env=os.environ, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "in_process.py", "custom_drafter.py", "custom_loss.py", "ask_daemons.py",
    }  # fmt: skip


@pytest.mark.process
def test_in_process(model_folder):
    said = run("in_process.py", model_folder, model_folder)
    assert "32 tokens" in said and "'answers': 2" in said


@pytest.mark.process
def test_own_drafter(model_folder):
    assert "same text: True" in run("custom_drafter.py", model_folder)


@pytest.mark.process
def test_own_loss_falls():
    values = [float(line.split()[-1]) for line in run("custom_loss.py").splitlines()]
    assert values == sorted(values, reverse=True) and values[-1] < 0.1 * values[0]


def test_settings_take_hooks_and_refuse_other_objects():
    parsed = parse_settings("speculative: {drafter: 'a.b:c'}\ntraining: {loss: {type: 'm:f'}}\n", EXAMPLES)
    assert parsed.speculative.drafter == "a.b:c" and parsed.training.loss.type == "m:f"
    for text in ("speculative: {drafter: nothing}", "training: {loss: {type: klx}}"):
        with pytest.raises(ConfigError, match="module:name"):
            parse_settings(text, EXAMPLES)


def test_the_settings_drafter_is_loaded_with_the_models(model_folder, tmp_path, monkeypatch):
    from specl import Engine

    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(drafter):
        text = f"models: {{target: {{name: {model_folder}}}, draft: {{name: null}}}}\nspeculative: {{drafter: '{drafter}'}}\n"
        return Engine.load(settings=parse_settings(text, tmp_path), calibrate=False)

    with load("custom_drafter:make") as engine:
        answer = engine.generate("one two one two one", max_tokens=24, temperature=0, ngram=False)
        assert answer.stats.model_drafted > 0
    for name, word in (("custom_drafter:nothing", "no 'nothing'"), ("no_such_module:make", "cannot be imported")):
        with pytest.raises(ConfigError, match=word):
            load(name)


def test_the_settings_loss_is_what_a_step_minimises(monkeypatch):
    import mlx.core as mx
    import numpy as np

    from specl.shared.errors import SpecLoraError
    from specl.shared.learning.losses import LossSettings, TargetTopK, position_losses
    from specl.shared.settings.plugins import load_plugin

    monkeypatch.syspath_prepend(str(EXAMPLES))
    from custom_loss import reverse_kl

    teacher = TargetTopK(mx.array([[0, 1]]), mx.log(mx.array([[0.6, 0.3]])), mx.array([0]), mx.ones(1))
    logits = mx.array([[0.5, 0.1, -1.0]])
    losses, _ = position_losses(
        logits,
        teacher,
        LossSettings("custom_loss:reverse_kl", custom=load_plugin("custom_loss:reverse_kl", "training.loss.type")),
    )
    assert np.allclose(losses, reverse_kl(logits, teacher, None)[0]) and losses.item() > 0
    monkeypatch.setattr("custom_loss.reverse_kl", lambda *a: (mx.zeros(()), mx.zeros(())))
    with pytest.raises(SpecLoraError, match="two arrays"):
        position_losses(
            logits,
            teacher,
            LossSettings("custom_loss:reverse_kl", custom=load_plugin("custom_loss:reverse_kl", "training.loss.type")),
        )

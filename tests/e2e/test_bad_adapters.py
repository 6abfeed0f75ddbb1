"""Deliberately bad adapters of the real pair: none is promoted, and none that is forced in by hand stays.

SmolLM2 and the head that ships, all daemons, the shipped settings but for the sizes named below. About 17 minutes of one
crowded core. `pytest -m slow -s tests/e2e/test_bad_adapters.py` prints what docs/learning.md quotes.
"""

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from specl.shared import prompts
from specl.shared.adapters.registry import Adapters, Manifest
from specl.shared.adapters.tensors import write_tensors
from specl.shared.bench.stream import conversation
from specl.shared.messaging.client import Client
from specl.shared.models.lora import LoraShape, change_norm_steps, choose_layers, linear_layers, lora_weights
from specl.shared.paths import Paths
from specl.shared.runtime.incremental import run_all
from specl.shared.settings.load import parse_settings
from tests.bench.null import Builtin, permuted
from tests.harness.cli_instance import make_cli_instance, stop
from tests.harness.waiting import wait_until

pytestmark = pytest.mark.slow

HELD_OUT = 0.5  # of the conversations, so that the 30 that a verdict needs are there after 64 requests
REQUESTS, TOKENS = 64, 24
MOST = 20  # requests until a bad adapter is gone
STEPS = 30  # of the training on permuted targets
SIZE = 0.1  # of the random factors: a change as large as the weights
SETTINGS = f"""
speculative: {{temperature: 0.0, max_tokens: {TOKENS}}}
training: {{enabled: false, on_battery: true, heldout_share: {HELD_OUT}, regression_prompts: 16, idle_seconds: 0.1}}
"""
REASONS = {
    "random": "the interval does not lie above zero",
    "permuted": "the interval does not lie above zero",
    "wrong base": "it was trained on draft 0123456789abcdef",
    "nan": "has values that are not finite",
}


def random_adapter(module, shape):
    rng, weights = np.random.default_rng(0), {}
    for key in shape.keys:
        out, inner = linear_layers(module)[key].weight.shape
        for part, size in (("lora_a", (inner, shape.rank)), ("lora_b", (shape.rank, out))):
            weights[f"{key}.{part}"] = mx.array(SIZE * rng.normal(size=size).astype(np.float32))
    return weights


@dataclass
class Bad:
    """What is wrong with an adapter, and its files."""

    name: str
    folder: Path
    manifest: Manifest

    def place(self, adapters, current=False):
        """A copy among the daemons' adapters, under the next number."""
        id = adapters.next_id()
        scratch = adapters.scratch(id)
        shutil.copytree(self.folder, scratch, dirs_exist_ok=True)
        adapters.publish(scratch, replace(self.manifest, id=id), make_current=current)
        return id


def make_bad(folder):
    """One of each, as the trainer writes them; each folder is what `adapters import` takes."""
    world = Builtin(kind_prompts=24, general_prompts=0)
    module, engine = world.learner.module, world.engine
    lora = world.settings.lora
    shape = LoraShape(lora.rank, lora.alpha, 0.0, choose_layers(module, "all"))
    noise = random_adapter(module, shape)
    spoiled = noise | {f"{shape.keys[0]}.lora_a": mx.full(noise[f"{shape.keys[0]}.lora_a"].shape, float("nan"))}
    rng = np.random.default_rng(0)
    training = permuted(world.pool, rng)
    world.attach(training)
    world.learn(training, STEPS, 0)
    learned, refreshed = lora_weights(module), world.learner.draft.hot
    own = engine.draft_fingerprint
    kinds = (
        ("random", noise, own, None),
        ("permuted", learned, own, refreshed),
        ("wrong base", noise, "0123456789abcdef", None),
        ("nan", spoiled, own, None),
    )
    return [write_bad(folder / kind[0].replace(" ", "-"), shape, engine, *kind) for kind in kinds]


def write_bad(folder, shape, engine, name, weights, base, hot):
    prints = (base, engine.target.fingerprint, engine.target.tokenizer_fingerprint)
    norm = run_all(change_norm_steps(shape, weights))
    manifest = Manifest(
        "000001", "lora", time.time(), engine.draft.name, *prints, "", "", shape.rank, shape.alpha, list(shape.keys),
        norm if norm == norm else 1.0, {}, {},
    )  # fmt: skip
    home = Adapters(folder)
    scratch = home.scratch("000001")
    write_tensors(scratch, shape, weights, hot)
    return Bad(name, home.publish(scratch, manifest, make_current=False), manifest)


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    return make_bad(tmp_path_factory.mktemp("bad"))


@pytest.fixture(scope="module")
def instance(bad):
    """All daemons, with live traffic behind them; `texts` are the target's own answers."""
    made = make_cli_instance(SETTINGS)
    made.process = made.start()
    made.client = Client(Paths(made.var, made.var), parse_settings(SETTINGS, made.var / "settings.yaml"))
    made.asked = [item.messages for item in prompts.load("heldout")[:REQUESTS]]
    made.texts = [
        made.client.ask(asked, conversation_id=conversation(n, HELD_OUT)).text for n, asked in enumerate(made.asked)
    ]
    wait_until(lambda: made.status()["store"]["generations"] >= REQUESTS, 60, "all is stored")
    yield made
    made.client.close()
    stop(made.process)
    shutil.rmtree(made.var, ignore_errors=True)


def active(instance):
    return instance.status()["adapter"]["active"]


@pytest.mark.parametrize("name", REASONS)
def test_past_the_gate(instance, bad, name):
    folder = next(one.folder for one in bad if one.name == name)
    done = instance.run("adapters", "import", str(folder), timeout=900)
    print(f"\n{name}, imported: {done.stdout.strip()}")
    assert done.returncode == 1 and done.stdout.startswith("rejected") and REASONS[name] in done.stdout
    assert not active(instance)


def force(instance, adapters, one, how):
    """Put it in by hand; its id and what was said."""
    if how == "placed as CURRENT":
        return one.place(adapters, current=True), ""
    id = one.place(adapters)
    done = instance.run("adapters", "activate", id)
    return id, f"exit code {done.returncode}: {(done.stdout + done.stderr).strip()}"


@pytest.mark.parametrize("how", ["activated", "placed as CURRENT"])
@pytest.mark.parametrize("name", ["wrong base", "nan"])
def test_mismatched_adapter_is_refused_with_its_reason(instance, bad, name, how):
    adapters = Adapters(instance.var / "adapters")
    id, said = force(instance, adapters, next(one for one in bad if one.name == name), how)
    if how == "placed as CURRENT":
        rejected = lambda: instance.client.status().inference.adapter.rejected.get(id)  # noqa: E731
        said = wait_until(rejected, 20, "the refusal")
        adapters.set_current("")
    else:
        assert said.startswith("exit code 1")
    print(f"\n{name}, {how}: {said}")
    assert REASONS[name].removeprefix("it was ") in said and not active(instance)
    assert instance.client.ask(instance.asked[0], record=False).text == instance.texts[0]


@pytest.mark.parametrize("how", ["activated", "placed as CURRENT"])
@pytest.mark.parametrize("name", ["random", "permuted"])
def test_what_drafts_badly_is_rolled_back(instance, bad, name, how):
    adapters = Adapters(instance.var / "adapters")
    id, _ = force(instance, adapters, next(one for one in bad if one.name == name), how)
    wait_until(lambda: active(instance) == id or id in adapters.rolled_back(), 20, "it drafts")
    requests = changed = 0
    while id not in adapters.rolled_back():
        assert requests < MOST, instance.client.status().inference.adapter
        answer = instance.client.ask(instance.asked[requests], record=False)
        changed += answer.text != instance.texts[requests]
        requests += 1
    print(f"\n{name}, {how}: gone after {requests} requests: {adapters.rolled_back()[id]}")
    assert changed == 0 and requests > 0 and not active(instance)
    assert instance.client.ask(instance.asked[0], record=False).text == instance.texts[0]

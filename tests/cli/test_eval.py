"""`specl-ctl eval` on random models: the figures are the engine's own, and the better adapter wins."""

import numpy as np
import pytest

from specl.shared.bench.compare_adapters import AdapterResults, difference
from specl.shared.paths import find_paths
from specl.shared.settings.schema import Settings
from tests.harness.fake_models import fake_engine, publish_adapter


@pytest.fixture
def random_models(monkeypatch):
    import specl.shared.loading.engine

    monkeypatch.setattr(specl.shared.loading.engine, "load_engine", fake_engine)
    monkeypatch.setenv("SPECL_TEST_TOKEN_MS", "0")


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("".join(f"question number {n}\n" for n in range(4)))
    return file


def test_an_adapter_that_ruins_the_draft_loses(specl, random_models, prompts):
    publish_adapter(find_paths().create().adapters, "000001", scale=3.0)
    outcome = specl("eval", prompts, "--max-tokens", 24, "--json")
    assert outcome.exit_code == 0, outcome.stderr
    adapted, bare = outcome.json["sides"]
    assert (adapted["adapter"], bare["adapter"]) == ("000001", "none")
    assert adapted["agreement"] < bare["agreement"] and adapted["acceptance"] < bare["acceptance"]
    assert outcome.json["agreement_difference"]["value"] == pytest.approx(adapted["agreement"] - bare["agreement"])
    assert adapted["positions"] == bare["positions"] > 0 and bare["acceptance"] == bare["accepted"] / bare["drafted"]
    assert adapted["tokens_per_second"] > 0 and outcome.json["plain_tokens_per_second"] > 0  # of the same prompts


def test_two_adapters_and_a_table_for_a_person(specl, random_models, prompts):
    folder = find_paths().create().adapters
    for id in ("000001", "000002"):
        publish_adapter(folder, id, scale=0.001)
    outcome = specl("eval", prompts, "--adapter", "000002", "--against", "000001", "--limit", 2, "--max-tokens", 8)
    assert outcome.exit_code == 0, outcome.stderr
    assert "acceptance (k=4)" in outcome.stdout and "2 prompts" in outcome.stdout


def test_mistakes_are_reported_before_models_load(specl, prompts, tmp_path):
    assert "both mean none" in specl("eval", prompts).stderr
    assert specl("eval", prompts).exit_code == 2
    assert "there is no adapter '000009'" in specl("eval", prompts, "--adapter", "000009").stderr
    assert specl("eval", tmp_path / "none.txt", "--adapter", "none").exit_code == 2


def test_no_draft_is_one_sentence(specl, prompts, tmp_path, monkeypatch):
    from specl.cli import eval as command
    from specl.shared.loading import engine as load

    settings = Settings()
    made = fake_engine(settings, tmp_path)
    made.draft = None
    monkeypatch.setattr(load, "load_engine", lambda *_: made)
    with pytest.raises(Exception, match="no draft"):
        command._load()


def test_the_interval_holds_what_was_put_in():
    rng = np.random.default_rng(1)
    positions = np.full(60, 50.0)
    first, second = (
        AdapterResults(n, None, hits=rng.binomial(50, p, 60).astype(float), positions=positions)
        for n, p in (("a", 0.7), ("b", 0.5))
    )
    for side in (first, second):
        side.agreement = side.hits.sum() / positions.sum()
    found = difference(first, second)
    assert found.low < 0.2 < found.high and found.low > 0.1
    same = difference(first, first)
    assert same.low == same.value == same.high == 0

"""`specl-ctl adapters list` and `show` read manifests that may hold anything where figures should be."""

import json
from contextlib import closing
from dataclasses import asdict

import pytest

from specl.cli.main import main
from specl.shared.adapters.registry import Adapters, Manifest
from specl.shared.paths import find_paths
from specl.shared.store import Store
from tests.fakes import make_activation, make_evaluation, make_training_run, to_row


def publish(id, metrics, training):
    adapters = Adapters(find_paths().create().adapters)
    scratch = adapters.scratch(id)
    (scratch / "adapter_config.json").write_text("{}")
    values = ["lora", 1.0, "draft", "b", "t", "k", "", "run", 4, 8.0, ["q"], 1.0]
    return adapters.publish(scratch, Manifest(id, *values, metrics, training))


GOOD = {"heldout_before": 0.25, "heldout_after": 0.5, "heldout_after_by_depth": [0.5, 0.25]}


def test_figures_are_shown_and_the_best_is_marked(capsys):
    publish("000001", GOOD, {"generations": ["a", "b"], "loss_first": 2, "loss_last": 1.5})
    main(["adapters", "list"])
    out = capsys.readouterr().out
    assert "0.250 > 0.500" in out and "best" in out and "latest" in out
    main(["adapters", "show", "best"])
    out = capsys.readouterr().out
    assert "0.2500 -> 0.5000" in out and "by depth 0.500, 0.250" in out and "2.0000 -> 1.5000" in out


@pytest.mark.parametrize("odd", [None, "high", [], {}, True])
def test_odd_figures_show_as_a_dash(capsys, odd):
    publish("000001", dict.fromkeys(GOOD, odd), {"loss_first": odd, "loss_last": odd})
    main(["adapters", "list"])
    assert "000001" in capsys.readouterr().out
    main(["adapters", "show", "1"])
    assert "- -> -" in capsys.readouterr().out


def test_a_malformed_manifest_is_listed_with_its_reason(capsys):
    path = publish("000001", GOOD, {})
    document = asdict(Adapters(path.parent).manifest("000001")) | {"rank": "four"}
    (path / "manifest.json").write_text(json.dumps(document))
    main(["adapters", "list"])
    assert "malformed" in " ".join(capsys.readouterr().out.split())


def store_run(run="run", id="000001"):
    """Store a run as the trainer records it."""
    with closing(Store(find_paths().create().store)) as store:
        changes = {"settings": {"data": {"failures": 30, "successes": 8, "replay": 96}}}
        made = [make_training_run(run, adapter_id=id, verdict="promoted" if id else "rejected", **changes)]
        made += [make_evaluation(f"{run}-0", training_run_id=run, adapter_id="", agreement=0.25)]
        after = {"training_run_id": run, "adapter_id": id or "candidate"}
        made += [make_evaluation(f"{run}-1", agreement=0.5, details={"low": 0.125, "high": 0.375}, **after)]
        made += (
            [
                make_activation("a1"),
                make_activation("a2", event="rolled_back", reason="live_acceptance", note="live acceptance fell"),
            ]
            if id
            else []
        )
        store.add_rows([to_row(record) for record in made])


def test_list_fits_eighty_columns_and_all_shows_refused(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    gate = {"low": 0.125, "high": 0.375, "regression_before": 0.38, "regression_after": 0.378}
    publish("000001", GOOD | {"gate": gate}, {"generations": ["a"]})
    store_run()
    store_run("second", "")
    main(["adapters", "list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 4 and max(map(len, lines)) <= 80, lines
    assert "0.250 > 0.500  +0.12 to +0.38  -0.0020" in lines[1]
    main(["adapters", "list", "--all"])
    assert "rejected" in capsys.readouterr().out


def test_show_and_json_tell_the_whole_story(capsys):
    counts = {"failures": 30, "successes": 8, "replay": 96, "generations": ["a"], "tokens": 900, "steps": 60}
    publish("000001", GOOD | {"gate": {"low": 0.125, "high": 0.375}}, counts)
    store_run()
    main(["adapters", "show", "latest"])
    out = capsys.readouterr().out
    assert "30 failures, 8 successes, 96 replay" in out and "+0.12 to +0.38" in out
    assert "activated, promoted" in out and "rolled_back, monitor: live acceptance fell" in out
    main(["adapters", "show", "--json", "1"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["run"]["gain_low"] == 0.125
    assert [line["who"] for line in shown["activations"]] == ["promoted", "monitor"]
    main(["adapters", "list", "--json"])
    assert json.loads(capsys.readouterr().out)[0]["run"]["failures"] == 30

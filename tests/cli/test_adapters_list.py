"""`specl-ctl adapters list` and `show` read manifests that may hold anything where figures should be."""

import json
from dataclasses import asdict

import pytest

from specl.cli.main import main
from specl.shared.adapters import Adapters, Manifest
from specl.shared.paths import find_paths


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
    assert "0.2500" in out and "0.5000" in out and "best" in out and "latest" in out
    main(["adapters", "show", "best"])
    out = capsys.readouterr().out
    assert "0.2500 -> 0.5000" in out and "by depth 0.500, 0.250" in out and "2.0000 -> 1.5000" in out


@pytest.mark.parametrize("odd", [None, "high", [], {}, True])
def test_odd_figures_are_a_dash_and_never_a_traceback(capsys, odd):
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

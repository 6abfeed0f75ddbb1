"""The whole loop on the real model: ask, record, store, train, publish, fuse, and back after a restart.

The tests of this file build on each other, in order, on one set of daemons.
"""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

from specl.shared.prompts import reserved
from tests.fakes import ROOT
from tests.harness.cli_instance import stop
from tests.harness.waiting import wait_until

KIND = "record-to-json"
LIVE = 32


def test_answer_goes_to_stdout_statistics_to_stderr(system):
    done = system.run("ask", "--max-tokens", "24", "What is the capital of France?")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "tok/s" in done.stderr and "adapter none" in done.stderr


def test_text_arrives_while_it_is_generated(system):
    asking = system.popen("ask", "--max-tokens", "40", "--num-draft-tokens", "0", "Count from one to thirty in words.")
    first = asking.stdout.read(4)
    assert first and asking.poll() is None, "the first letters came before the end"
    asking.communicate(timeout=60)
    assert asking.returncode == 0


def test_json_holds_the_documented_keys(system):
    answer = system.ask("List three rivers.", "--max-tokens", "20")
    assert {"id", "text", "tokens", "finish_reason", "adapter_id", "recorded", "stats"} == answer.keys()
    assert answer["recorded"] is True and answer["tokens"] <= 20
    wanted = {"drafted", "accepted", "rounds", "acceptance_rate", "mean_accepted_length", "acceptance_by_depth"}
    wanted |= {"tokens_by_source", "k_histogram", "parked_reason", "tokens_per_second", "ttft_ms"}
    wanted |= {"plain_tokens_per_second_estimate"}
    assert wanted <= answer["stats"].keys()
    assert sum(answer["stats"]["tokens_by_source"].values()) == answer["tokens"]


def test_greedy_text_does_not_depend_on_drafting(system):
    texts = {
        k: system.ask("Describe a small harbour at dawn.", "--max-tokens", "40", "--num-draft-tokens", k)["text"]
        for k in ("0", "1", "4")
    }
    assert len(set(texts.values())) == 1


def test_one_seed_gives_one_text(system):
    ask = ("Tell me a short joke.", "--temperature", "0.8", "--seed", "7", "--max-tokens", "24")
    assert system.ask(*ask, "--num-draft-tokens", "0")["text"] == system.ask(*ask, "--num-draft-tokens", "3")["text"]


def test_several_terminals_at_once_are_all_answered(system):
    asking = [
        system.popen("ask", "--json", "--max-tokens", "16", f"Name {n} animals.")
        for n in ("two", "three", "four", "five", "six")
    ]
    outputs = [process.communicate(timeout=120) for process in asking]
    assert all(process.returncode == 0 for process in asking), outputs
    assert all(json.loads(out)["tokens"] for out, _ in outputs)
    assert any("waiting" in err for _, err in outputs), "waiting clients see that they wait"


def test_ctrl_c_cancels_on_the_server(system):
    asking = system.popen(
        "ask", "--max-tokens", "400", "--num-draft-tokens", "0", "Write a long story about a lighthouse."
    )
    asking.stdout.read(10)
    asking.send_signal(signal.SIGINT)
    asking.communicate(timeout=10)
    assert asking.returncode == 130
    wait_until(lambda: system.status()["queue"]["in_flight"] == 0, 5, "the slot is free")


def test_a_client_killed_mid_stream_frees_its_slot(system):
    asking = system.popen(
        "ask", "--max-tokens", "400", "--num-draft-tokens", "0", "Write a long story about a lighthouse."
    )
    asking.stdout.read(10)
    asking.kill()
    asking.communicate()
    wait_until(lambda: system.status()["queue"]["in_flight"] == 0, 10, "the slot is free")


def test_the_clients_example_runs(system):
    example = ROOT / "examples" / "ask_daemons.py"
    done = subprocess.run([sys.executable, example], env=system.environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "recorded: True" in done.stdout and "'inference': " in done.stdout


def test_bad_requests_are_refused_in_one_line(system):
    long = "word " * 9000
    for arguments, text in (
        (("ask", "   "), "empty"),
        (("ask", "--max-tokens", "0", "hello"), "'--max-tokens': 0 is not in the range"),
        (("ask", "--max-tokens", "-3", "hello"), "'--max-tokens': -3 is not in the range"),
        (("ask", "--temperature", "-1", "hello"), "'--temperature': -1.0 is not in the range"),
        (("ask", "--top-p", "1.5", "hello"), "'--top-p': 1.5 is not in the range"),
        (("ask", long), "tokens; "),
        (("adapters", "activate", "77"), "there is no adapter"),
    ):
        done = system.run(*arguments)
        assert done.returncode in (1, 2), (arguments[:2], done.stdout)
        assert text in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert system.ask("Still there?", "--max-tokens", "4")["tokens"]


def test_second_set_of_daemons_is_refused(system):
    holder = str(system.status()["collector"]["pid"])
    done = subprocess.run(
        [os.sys.executable, "-m", "specl.daemons.supervise", "collector"],
        env=system.environment,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 78
    assert holder in done.stderr and "already serves" in done.stderr
    assert system.status()["collector"]["state"] == "ready"


def test_every_answer_is_stored_with_its_disagreements(system):
    for prompt in reserved.prompts(KIND, LIVE, split="live"):
        assert system.ask(prompt, "--max-tokens", "40", "--num-draft-tokens", "2")["recorded"]
    wait_until(lambda: system.status()["outbox"]["pending"] == 0, 20, "the outbox is empty")
    with closing(sqlite3.connect(system.var / "store.db")) as db:
        (count,) = db.execute("SELECT count(*) FROM generations WHERE prompt LIKE '%JSON%'").fetchone()
        assert count >= LIVE
        row = db.execute(
            "SELECT top_k, length(top_ids), length(output_tokens), length(tail) FROM generations ORDER BY n DESC LIMIT 1"
        ).fetchone()
        assert row[1] == row[2] * row[0] and row[3] * 2 == row[2], "one top-k row and one tail for each output token"
        bad = db.execute("SELECT count(*) FROM disagreements WHERE draft_token = target_token").fetchone()[0]
        assert bad == 0
        lines = db.execute(
            "SELECT draft_text, target_text, draft_confidence, target_confidence FROM disagreements"
        ).fetchall()
        assert len(lines) > LIVE and all(0 <= line[2] <= 1 and 0 <= line[3] <= 1 for line in lines)
        assert db.execute("SELECT count(*) FROM quarantine").fetchone() == (0,)


def test_sqlite3_alone_reads_the_failures(system):
    done = subprocess.run(
        [os.sys.executable, "-c", "import sqlite3,sys;print(sqlite3.connect(sys.argv[1]).execute('select * from failures').fetchall()[0])",
         str(system.var / "store.db")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "JSON" in done.stdout
    listed = system.run("store", "failures", "--limit", "3")
    assert listed.returncode == 0 and "accept" in listed.stdout


def test_export_has_the_documented_shape(system):
    done = system.run("store", "export", "--jsonl")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) > LIVE
    assert all(
        row.keys() == {"id", "prompt", "target_output", "acceptance_rate", "timestamp", "disagreements"} for row in rows
    )
    keys = {"position", "draft_token", "target_token", "draft_confidence", "target_confidence", "context_tokens"}
    assert all(item.keys() == keys for row in rows for item in row["disagreements"])


def test_fast_mode_keeps_no_token_detail(system):
    answer = system.ask("Name a colour.", "--mode", "fast", "--max-tokens", "8")
    wait_until(lambda: system.status()["outbox"]["pending"] == 0)
    with closing(sqlite3.connect(system.var / "store.db")) as db:
        query = "SELECT mode, top_ids FROM generations WHERE id = ?"
        assert wait_until(lambda: db.execute(query, (answer["id"],)).fetchone()) == ("fast", None)


def test_no_record_leaves_nothing_in_the_store(system):
    answer = system.ask("My secret word is Quixotherm.", "--no-record", "--max-tokens", "8")
    assert answer["recorded"] is False
    time.sleep(1.5)
    stored = b"".join(
        path.read_bytes()
        for path in system.var.rglob("*")
        if path.is_file() and path.suffix in (".db", ".db-wal", ".log")
    )
    assert b"Quixotherm" not in stored


def test_training_publishes_an_adapter_that_inference_fuses(system):
    done = system.run("train", "--now", "--wait", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "promoted" in done.stdout, done.stdout
    found = wait_until(lambda: (s := system.status()) and s["adapter"]["active"] and s, 20, "an active adapter")
    assert found["adapter"]["active"] == "000001" and found["adapter"]["form"] == "fused"
    shown = json.loads(system.run("adapters", "show", "--json").stdout)
    assert shown["change_norm"] > 0
    assert shown["metrics"]["heldout_after"] > shown["metrics"]["heldout_before"]
    assert system.ask("What is a lighthouse?", "--max-tokens", "8")["adapter_id"] == "000001"


def test_words_stay_the_same_with_the_adapter(system):
    prompt = reserved.prompts(KIND, 1, split="unseen")[0]
    plain = system.ask(prompt, "--max-tokens", "40", "--num-draft-tokens", "0")["text"]
    assert system.ask(prompt, "--max-tokens", "40", "--num-draft-tokens", "4")["text"] == plain


def test_the_verdict_is_a_row(system):
    wait_until(lambda: system.status()["outbox"]["pending"] == 0)
    with closing(sqlite3.connect(system.var / "store.db")) as db:
        row = db.execute(
            "SELECT verdict, adapter_id, heldout_before, heldout_after, loss_first, loss_last FROM adapter_history"
        ).fetchone()
        assert row[:2] == ("promoted", "000001") and row[3] > row[2] and row[5] < row[4]
        assert db.execute("SELECT event, adapter_id FROM activations ORDER BY n").fetchall()[-1] == (
            "activated",
            "000001",
        )
        assert db.execute("SELECT id FROM adapters").fetchall() == [("000001",)]


def test_zero_or_external_adapter_by_hand_is_refused(system):
    from specl.shared.adapters.registry import Adapters

    source = system.var / "adapters" / "000001"
    for id, spoil, reason in (("000002", _zero, "zero"), ("000003", _foreign, "trained on draft")):
        _copy_adapter(source, system.var / "adapters" / id, spoil)
        Adapters(system.var / "adapters").set_current(id)
        refused = wait_until(lambda i=id: [p for p in system.status()["problems"] if i in p], 15, f"{id} refused")
        assert reason in refused[0]
        assert system.status()["adapter"]["active"] == "000001"
    Adapters(system.var / "adapters").set_current("000001")
    for id in ("000002", "000003"):
        shutil.rmtree(system.var / "adapters" / id)


def _copy_adapter(source, target, spoil):
    shutil.copytree(source, target)
    manifest = json.loads((target / "manifest.json").read_text()) | {"id": target.name}
    (target / "manifest.json").write_text(json.dumps(spoil(target, manifest)))


def _zero(folder, manifest):
    import hashlib

    import numpy as np
    from safetensors.numpy import load_file, save_file

    path = folder / "adapters.safetensors"
    save_file({name: np.zeros_like(value) for name, value in load_file(path).items()}, path, metadata={"format": "mlx"})
    manifest["files"]["adapters.safetensors"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return manifest


def _foreign(folder, manifest):
    return manifest | {"base_fingerprint": "0123456789abcdef"}


def test_rollback_and_activate_by_hand(system):
    assert "without an adapter" in system.run("adapters", "unload").stdout
    assert system.status()["adapter"]["active"] == ""
    assert system.run("adapters", "activate", "1").returncode == 0
    assert system.status()["adapter"]["active"] == "000001"
    assert system.run("adapters", "rollback").returncode == 0
    assert system.status()["adapter"]["active"] == ""
    assert system.run("adapters", "activate", "best").returncode == 0
    listed = system.run("adapters", "list").stdout
    assert "000001" in listed and "current" in listed


def test_ctrl_c_stops_all_restart_keeps_adapter(system):
    pids = [system.status()[role]["pid"] for role in ("inference", "collector", "trainer")]
    stop(system.process)
    assert not any(_alive(pid) for pid in pids)
    down = system.status()
    assert down["inference"]["state"] == "stopped" and down["store"]["generations"] > LIVE
    assert any("honcho start" in problem for problem in down["problems"])
    system.process = system.start()
    assert system.status()["adapter"]["active"] == "000001"
    assert system.ask("Hello again.", "--max-tokens", "4")["adapter_id"] == "000001"


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_daemon_is_back_and_lost_nothing(system):
    wait_until(lambda: system.status()["outbox"]["pending"] == 0)
    pid = system.status()["collector"]["pid"]
    os.kill(pid, signal.SIGKILL)
    answer = system.ask("Name a planet.", "--max-tokens", "6")
    assert answer["recorded"]
    wait_until(lambda: system.status()["collector"]["pid"] not in (None, pid), 20, "the collector is back")
    # from a process of its own, as a person would look: this one has had the file open, and SQLite shares what it knows of
    # a file among a process's connections
    query = "import sqlite3, sys; print(sqlite3.connect(sys.argv[1]).execute(sys.argv[2], sys.argv[3:]).fetchone()[0])"
    count = "SELECT count(*) FROM generations WHERE id = ?"

    def stored():
        command = [sys.executable, "-c", query, str(system.var / "store.db"), count, answer["id"]]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert wait_until(stored, what="the record stored") == 1


def test_purge_forgets_everywhere(system):
    answer = system.ask("Please remember the word Zanzibarometer.", "--max-tokens", "8")
    wait_until(lambda: system.status()["outbox"]["pending"] == 0)
    time.sleep(1)
    done = system.run("store", "purge", "--pattern", "Zanzibarometer", "--yes")
    assert done.returncode == 0, done.stderr
    assert "1 generations removed" in done.stdout
    files = [path for path in system.var.rglob("*") if path.is_file()]
    assert not [path for path in files if b"Zanzibarometer" in path.read_bytes()]
    assert not (system.var / "hidden" / f"{answer['id']}.npy").exists()

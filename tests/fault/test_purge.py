"""Privacy: a purge leaves no byte of the text under var/, whatever runs; what is not to be kept is kept nowhere."""

import json
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from specl.shared.adapters.marks import MarkState
from specl.shared.adapters.registry import Adapters
from specl.shared.errors import ConfigError
from specl.shared.messaging.codec import encode
from specl.shared.messaging.messages import Envelope, TrainingRun
from specl.shared.messaging.outbox import Outbox
from specl.shared.retention.checkpoints import all_of, checkpoint_folder, generations_in
from specl.shared.retention.redaction import Redactor
from specl.shared.settings.load import parse_settings
from specl.shared.settings.schema import Records
from specl.shared.store import Store
from tests.harness.fake_models import make_adapter
from tests.harness.instance import SETTINGS, ready_for_training
from tests.harness.records import fill, generation
from tests.harness.waiting import wait_until

SECRET = "the purple heron of Aldersgate hums at noon"


def specl(instance, *arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-c", "from specl.cli.main import main; main()", *arguments],
        env=instance.environment() | {"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def files_with(instance, text, piece=24):
    """Every file that holds a remnant of `text`: any of its pieces as UTF-8, in JSON or as token ids of the fake tokenizer."""
    pieces = [text[start : start + piece] for start in range(0, max(1, len(text) - piece + 1))]
    needles = {form.encode() for part in pieces for form in (part, json.dumps(part)[1:-1])}
    needles |= {np.array([ord(letter) for letter in part], "<u4").tobytes() for part in pieces}
    return [
        str(path.relative_to(instance.folder))
        for path in instance.folder.rglob("*")
        if path.is_file() and any(needle in path.read_bytes() for needle in needles)
    ]


def spool_and_checkpoint(instance, id):
    """What hidden states and an unfinished training run of a generation leave, also where a kill cut the writing short."""
    np.save(instance.paths.hidden / f"{id}.npy", np.ones((4, 8), np.float16))
    (instance.paths.hidden / f".{id}.partial").write_bytes(b"\x93NUMPY")
    for checkpoint in all_of(checkpoint_folder(instance.paths.training)):
        checkpoint.mkdir()
        (checkpoint / "state.json").write_text(json.dumps({"ids": [id]}))


def adapter_from(instance, id, generations, parent=""):
    scratch, manifest = make_adapter(instance.paths.adapters, id)
    Adapters(instance.paths.adapters).publish(
        scratch, replace(manifest, parent_id=parent, training={"generations": generations})
    )


@pytest.mark.parametrize("running", [True, False])
def test_a_purge_by_pattern_leaves_no_byte_behind(instance, figures, running):
    daemons = [instance.start(role) for role in ("inference", "collector", "trainer")]
    for daemon in daemons:
        instance.ready(daemon.role)
    instance.ask("something harmless that stays here")
    secret = instance.ask(f"{SECRET},\nthey say")
    instance.settle()
    wait_until(lambda: len(instance.stored()) == 2, 5, "both are stored")
    spool_and_checkpoint(instance, secret.generation_id)
    with sqlite3.connect(instance.paths.store) as db:
        db.execute("VACUUM INTO ?", (str(instance.folder / "store.db.backup-0-1"),))
    (instance.paths.logs / "old.log").write_text(f'{{"event": "kept"}}\n{{"event": "{SECRET}"}}\n')
    (instance.paths.logs / "chat_history").write_text(
        f"\n# 2026-11-21 10:00:00\n+a word\n+that stays\n\n# 2026-11-21 10:01:00\n+{SECRET},\n+they say\n"
    )
    (instance.folder / ".store.db.backup-0-2").write_text(SECRET)  # cut short
    assert list(instance.paths.answers.glob("*.u32")), "past answers are remembered"
    regression = instance.paths.regression / "fake-target-48"  # the target's words on shipped prompts: nobody's
    regression.mkdir(parents=True)
    (regression / "r-8.npz").write_bytes(b"shipped")
    if not running:
        for daemon in daemons:
            daemon.stop()
    outbox = Outbox(instance.paths.outbox("inference"))
    if not running:  # one that has not been delivered yet
        fill(outbox, ["undelivered"], text=SECRET)
    outbox.close()
    assert len(files_with(instance, SECRET)) >= 3
    start = time.monotonic()
    said = specl(instance, "store", "purge", "--pattern", "PURPLE heron", "--yes")
    seconds = time.monotonic() - start
    assert "is erased under" in said
    assert files_with(instance, SECRET) == []
    assert files_with(instance, "harmless")
    assert not list(instance.paths.hidden.iterdir()) and not list(instance.paths.training.iterdir())
    assert not list(instance.paths.answers.iterdir())
    assert (regression / "r-8.npz").exists()
    assert (instance.paths.logs / "old.log").read_text() == '{"event": "kept"}\n'
    assert (instance.paths.logs / "chat_history").read_text() == "\n# 2026-11-21 10:00:00\n+a word\n+that stays\n"
    assert not list(instance.folder.glob("*store.db.backup-*"))
    assert len(instance.stored()) == 1
    figures(purge_s=seconds, daemons="running" if running else "down")


def test_purge_empties_caches_of_the_running_daemon(instance):
    instance.start("inference")
    instance.start("collector")
    instance.ready("inference")
    with instance.client() as client:
        again = [instance.ask(SECRET, client).stats.reused_prompt_tokens for _ in range(2)]
        instance.settle()
        specl(instance, "store", "purge", "--pattern", SECRET, "--yes")
        after = instance.ask(SECRET, client, record=False).stats.reused_prompt_tokens
    assert again[0] == 0 and again[1] >= len(SECRET), "a second question finds the first one's prompt in the cache"
    assert after == 0, "the purge left it there"


def test_a_purge_finds_records_on_their_way(instance):
    instance.start("inference")
    instance.ready("inference")
    instance.start("collector")
    for n in range(10):
        instance.ask(f"{SECRET} {n}")
    specl(instance, "store", "purge", "--pattern", SECRET, "--yes")
    time.sleep(2.5)  # two of the collector's ticks
    assert files_with(instance, SECRET) == []
    assert not instance.stored() and not instance.waiting()


def test_purges_by_id_age_and_all(instance):
    store = Store(instance.paths.store)
    now = time.time()
    ages = {"old": 10, "new": 0.1}
    store.add_rows(
        [
            Envelope(id, "Generation", encode(generation(id, f"words of {id}", created_at=now - 86400 * age)))
            for id, age in ages.items()
        ]
    )
    store.add_rows([Envelope("poison", "Generation", b"\xc1" + SECRET.encode())])
    store.close()
    specl(instance, "store", "purge", "--before", "3d", "--yes")
    assert instance.stored() == ["new"]
    specl(instance, "store", "purge", "--pattern", SECRET, "--yes")
    assert instance.stored("quarantine") == []
    specl(instance, "store", "purge", "--id", "nobody", "--yes", code=1)
    specl(instance, "store", "purge", "--id", "ne", "--yes")
    assert instance.stored() == []
    specl(instance, "store", "purge", "--yes", code=2)
    specl(instance, "store", "purge", "--all", "--yes")


def test_case_of_any_script_is_ignored(instance):
    store = Store(instance.paths.store)
    store.add_rows([Envelope("a", "Generation", encode(generation("a", "der ÜBERSEEHAFEN von früher")))])
    store.add_rows([Envelope("b", "Generation", encode(replace(generation("b"), conversation_id="Überseehafen, 3rd")))])
    store.add_rows([Envelope("poison", "Generation", b"\xc1" + "ein Überseehafen".encode())])
    store.close()
    outbox = Outbox(instance.paths.outbox("inference"))
    fill(outbox, ["c"], text="kein überseehafen")
    outbox.append("worse", "Generation", b"\xc1" + "ÜBERSEEHAFEN".encode())
    outbox.close()
    said = json.loads(specl(instance, "store", "purge", "--pattern", "überSeehafen", "--yes", "--json"))
    assert said["stored"] == 3 and said["forgotten"] == 5
    assert not any(files_with(instance, form) for form in ("Überseehafen", "ÜBERSEEHAFEN", "überseehafen"))
    specl(instance, "store", "purge", "--all", "--json", code=2)


def test_purge_makes_no_old_failure_new(instance):
    store = Store(instance.paths.store)
    store.set_threshold(0.5)
    store.add_rows([Envelope(id, "Generation", encode(generation(id, f"about {id} and {SECRET}"))) for id in "abcd"])
    run = TrainingRun("run", 1.0, 2.0, "failures", "t", "rejected", "", "", "", 3, 1, 1, None, None, "c", {})
    store.add_rows([Envelope("run", "TrainingRun", encode(run))])
    assert store.pending_failures() == 1
    store.close()
    specl(instance, "store", "purge", "--id", "c", "--yes")
    store = Store(instance.paths.store, read_only=True)
    try:
        assert store.pending_failures() == 1, "a and b were learned from, d was not"
    finally:
        store.close()


def test_ages_that_are_none_are_refused(instance):
    for age in ("1e308d", "nanh", "-3d", "0000-00-00", "yesterday"):
        assert "written like" in specl(instance, "store", "purge", "--before", age, "--yes", code=2)


def test_retraining_resumes_from_the_newest_clean_adapter(instance, figures):
    ready_for_training(instance)
    with sqlite3.connect(instance.paths.store) as db:
        secret, *others = [row[0] for row in db.execute("SELECT id FROM generations ORDER BY n")]
    db.close()
    adapter_from(instance, "000001", others[:2])
    adapter_from(instance, "000002", others[:3], parent="000001")
    Adapters(instance.paths.adapters).marks.set("000002", MarkState.ROLLBACK_PENDING, "it collapsed")
    adapter_from(instance, "000003", [secret], parent="000001")
    adapter_from(instance, "000004", others[:3], parent="000003")
    instance.start("trainer", SPECL_TEST_RISING="1")
    instance.ready("trainer")
    wait_until(lambda: instance.status("inference")["adapter"]["active"] == "000004", 15, "the newest drafts")
    start = time.monotonic()
    said = specl(instance, "store", "purge", "--id", secret, "--yes", "--retrain")
    assert "adapters removed: 000003, 000004" in said and "drafting with adapter 000001" in said
    assert "training on what is left, from adapter 000001" in said
    adapters = Adapters(instance.paths.adapters)
    assert adapters.ids()[:2] == ["000001", "000002"] and not {"000003", "000004"} & set(adapters.ids())
    wait_until(lambda: "000005" in adapters.ids(), 90, "the run ends with an adapter")
    made = adapters.manifest("000005")
    assert made.parent_id == "000001" and made.generations and secret not in made.generations
    assert set(made.generations) <= set(others)
    wait_until(lambda: instance.status("inference")["adapter"]["active"] == "000005", 15, "it drafts")
    figures(retrained_s=time.monotonic() - start, learned_from=len(made.generations))


def test_purge_ends_a_running_training(instance):
    ready_for_training(instance)
    instance.set(instance.file.read_text().replace("num_epochs: 2", "num_epochs: 2000"))
    trainer = instance.start("trainer", SPECL_TEST_RISING="1", SPECL_TEST_CHECKPOINT_S="0")
    instance.ready("trainer")
    with instance.client() as client:
        assert client.train(now=True).ok
    wait_until(lambda: generations_in(checkpoint_folder(instance.paths.training)), 60, "a checkpoint is there")
    learned = sorted(generations_in(checkpoint_folder(instance.paths.training)))
    specl(instance, "store", "purge", "--id", learned[0], "--yes")
    body = instance.ready("trainer")
    assert not body["training"]["abandoning"] and trainer.code is None
    assert learned[0] not in generations_in(checkpoint_folder(instance.paths.training))
    assert Adapters(instance.paths.adapters).ids() == []
    assert "training.abandoned" in instance.output("trainer")


def test_purge_names_and_drops_adapters_on_request(instance):
    store = Store(instance.paths.store)
    store.add_rows([Envelope(id, "Generation", encode(generation(id, f"{SECRET} {id}"))) for id in ("a", "b")])
    store.close()
    adapter_from(instance, "000001", ["x"])
    adapter_from(instance, "000002", ["a"], parent="000001")
    adapter_from(instance, "000003", ["y"], parent="000002")
    instance.start("inference")
    assert instance.ready("inference")["adapter"]["active"] == "000003"
    said = specl(instance, "store", "purge", "--id", "a", "--yes")
    assert "000002, 000003" in said
    Store(instance.paths.store).add_rows([Envelope("a", "Generation", encode(generation("a", SECRET)))])
    said = specl(instance, "store", "purge", "--id", "a", "--yes", "--drop-adapters")
    adapters = Adapters(instance.paths.adapters)
    assert adapters.ids() == ["000001"] and adapters.current() == "000001"
    assert instance.status("inference")["adapter"]["active"] == "000001"
    assert adapters.next_id() == "000004", "an id is never used twice"


def test_no_record_leaves_nothing_anywhere(instance):
    instance.start("inference")
    instance.start("collector")
    instance.ready("inference")
    with instance.client() as client:
        done = instance.ask(f"{SECRET}, off the record", client, record=False)
        assert not done.recorded and done.tokens == 8
        again = instance.ask(f"{SECRET}, off the record", client, record=False)
        assert again.stats.reused_prompt_tokens == 0, "the prefix cache kept it"
    instance.ask("on the record")
    instance.settle()
    assert files_with(instance, SECRET) == []
    assert SECRET not in instance.output("inference")
    assert len(instance.stored()) == 1


def test_statistics_keep_figures_and_no_text(instance):
    instance.set(SETTINGS + "records: {keep: statistics}\n")
    for role in ("inference", "collector", "trainer"):
        instance.start(role)
    instance.ready("inference")
    assert instance.ask(SECRET).recorded
    instance.settle()
    assert files_with(instance, SECRET) == []
    with sqlite3.connect(instance.paths.store) as db:
        row = db.execute(
            "SELECT output_count, prompt, output, messages, length(prompt_tokens), top_ids, drafted FROM generations"
        ).fetchone()
        assert row[0] == 8 and row[1:6] == ("", "", "[]", 0, None) and row[6] > 0
        assert db.execute("SELECT count(*) FROM disagreements").fetchone() == (0,)
        db.execute("SELECT * FROM failures").fetchall()
    instance.ready("trainer")
    with instance.client() as client:
        reply = client.train(now=True)
    assert not reply.ok and "statistics" in reply.message
    assert instance.ready("collector")["summary"]["generations"] == 1


def test_redaction_blots_text_and_drops_tokens(instance):
    instance.set(SETTINGS + "records: {redact: ['purple \\w+', '\\d{6}']}\n")
    instance.start("inference")
    instance.start("collector")
    instance.ready("inference")
    instance.ask(SECRET)
    instance.ask("nothing to hide")
    instance.settle()
    assert files_with(instance, "purple heron") == []
    with sqlite3.connect(instance.paths.store) as db:
        rows = dict(db.execute("SELECT prompt LIKE '%Aldersgate%', length(prompt_tokens) FROM generations").fetchall())
    assert rows[1] == 0 and rows[0] > 0


def test_redaction_reaches_nested_content():
    keep = Redactor(Records(redact=["secret"]))
    record = generation("x", "plain")
    assert keep.apply(record).whole and keep.apply(record).record is record
    nested = replace(record, messages=[{"role": "user", "content": [{"type": "text", "text": "a secret"}]}])
    redaction = keep.apply(nested)
    assert not redaction.whole
    assert redaction.record.messages[0]["content"][0]["text"] == "a [redacted]"
    assert redaction.record.output_tokens == b"" and redaction.record.top_k is None
    with pytest.raises(ConfigError, match="regular expression"):
        parse_settings("records: {redact: ['(']}", "x.yaml")


@pytest.mark.parametrize(
    "limits, left", [("retention_days: 5", 4), ("max_generations: 3", 3), ("max_store_mb: 1", None)]
)
def test_collector_drops_old_excess_and_large_records(instance, limits, left):
    instance.set(SETTINGS + f"records: {{{limits}}}\n")
    store = Store(instance.paths.store)
    now = time.time()
    rows = [generation(str(n), f"{n} " + "y" * 300_000, created_at=now - 86400 * n) for n in range(8)]
    store.add_rows([Envelope(row.id, "Generation", encode(row)) for row in rows])
    store.close()
    np.save(instance.paths.hidden / "7.npy", np.ones((4, 8), np.float16))
    instance.start("collector")
    instance.ready("collector")
    wait_until(lambda: len(instance.stored()) < 8, 10, "the oldest are gone")
    kept = sorted(int(id) for id in instance.stored())
    assert kept == list(range(len(kept))), "the oldest go first"
    assert left is None or len(kept) in (left, left + 1)
    assert not (instance.paths.hidden / "7.npy").exists()

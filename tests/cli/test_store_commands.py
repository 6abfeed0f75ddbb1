"""`specl-ctl store`: what is shown, sorted, exported and imported."""

import json
import sys

import numpy as np
import pytest

from specl.cli.store.import_jsonl import parse
from specl.cli.store.show import marked, marked_tokens
from specl.shared.learning.imported_texts import text_logprobs, to_generation, with_token_texts
from specl.shared.paths import find_paths
from specl.shared.runtime.locks import is_locked
from specl.shared.store import Store
from specl.shared.store.rows import row_of, stored_generation
from tests.fakes import make_disagreement, make_generation, to_row

LINE = {
    "id": "from-elsewhere",
    "prompt": "Why?",
    "target_output": "Because of it.",
    "acceptance_rate": 0.35,
    "timestamp": "2026-01-31T12:00:00Z",
    "disagreements": [
        {
            "position": 1, "draft_token": 5, "target_token": 6, "draft_confidence": 0.4, "target_confidence": 0.7,
            "context_tokens": [1, 2],
        }
    ],
}  # fmt: skip


def ids(outcome):
    return [row["id"][:2] for row in outcome.json]


# ------------------------------------------------------------------------------------------------ failures
def test_failures_are_sorted_and_paged(specl, filled):
    assert ids(specl("store", "failures", "--json")) == ["09", "07", "05", "03", "01"]
    assert ids(specl("store", "failures", "--json", "--sort", "oldest", "--limit", 2, "--page", 2)) == ["05", "07"]
    assert ids(specl("store", "failures", "--json", "--sort", "acceptance", "--limit", 1)) == ["09"]
    assert ids(specl("store", "failures", "--json", "--sort", "disagreements", "--limit", 1)) == ["09"]


def test_failures_are_filtered(specl, filled):
    assert ids(specl("store", "failures", "--json", "--contains", "select")) == ["07"]
    assert ids(specl("store", "failures", "--json", "--adapter", "none")) == ["05", "03", "01"]
    assert ids(specl("store", "failures", "--json", "--adapter", "000002")) == ["09", "07"]
    assert ids(specl("store", "failures", "--json", "--below", 0.2)) == ["09"]
    assert ids(specl("store", "failures", "--json", "--since", "2026-09-21")) == ["09", "07", "05", "03", "01"]
    assert specl("store", "failures", "--since", "yesterday").exit_code == 2


@pytest.mark.parametrize("part", ['say "été"\nto ÜBER', "L'ÉTÉ", "above\0BELOW", "plain ÉTÉ"])
def test_failures_contain_what_a_purge_finds(specl, filled, part):
    content = 'Say "ÉTÉ"\nto über, l\'été, above\0below'
    store = Store(find_paths().store)
    chat = [{"role": "user", "content": content}]
    store.add_rows([to_row(make_generation("ab", messages=chat, prompt="", acceptance_rate=0.1))])
    store.add_rows([to_row(make_generation("cd", messages=[], prompt="plain été", acceptance_rate=0.1))])
    store.close()
    expected = ["cd"] if part.startswith("plain") else ["ab"]
    assert ids(specl("store", "failures", "--json", "--contains", part)) == expected


def test_a_page_says_where_it_is(specl, filled):
    outcome = specl("store", "failures", "--limit", 2)
    assert "page 1 of 3, 5 failures; `--page 2` goes on" in outcome.stderr
    last = specl("store", "failures", "--limit", 2, "--page", 3).stderr
    assert "page 3 of 3" in last and "goes on" not in last
    assert "page 9 is beyond the last of 5" in specl("store", "failures", "--page", 9).stdout


def test_no_store_is_one_sentence(specl):
    for command in (["summary"], ["failures"], ["show", "ab"], ["export", "--jsonl"]):
        outcome = specl("store", *command)
        assert outcome.exit_code == 1 and "there is no store" in outcome.stderr and "Traceback" not in outcome.stderr


# ------------------------------------------------------------------------------------------------ show
class Letters:
    """Token n is letter n of the alphabet; 99 is the end."""

    def decode(self, tokens):
        return "".join(chr(97 + token) for token in tokens if token != 99)


def stored(**changes):
    record = make_generation("x", **changes)
    return stored_generation(row_of(record), record.disagreements)


def test_marks_stand_where_the_target_disagreed():
    row = stored(
        output="abcd", output_ids=[0, 1, 2, 3, 99], sources=bytes([0, 1, 0, 2, 0]),
        disagreements=[make_disagreement(2, draft_text="z")],
    )  # fmt: skip
    tokens = marked_tokens(row, Letters())
    assert marked(tokens, colour=False) == "ab[-z-]{+c+}d"
    assert [piece.source for piece in tokens] == ["target", "model", "target", "ngram", "target"]
    assert "\x1b[32mb" in marked(tokens, colour=True) and "\x1b[36md" in marked(tokens, colour=True)


def test_text_cut_at_a_stop_string_is_annotated():
    row = stored(output="ab", output_ids=[0, 1, 2], sources=bytes(3), disagreements=[])
    assert marked(marked_tokens(row, Letters()), colour=False) == "ab"


def test_another_tokenizer_marks_nothing():
    assert marked_tokens(stored(output="hello", output_ids=[0, 1, 2], sources=bytes(3)), Letters()) == []


def test_show_finds_by_beginning_and_lists_disagreements(specl, filled):
    outcome = specl("store", "show", "03")
    assert outcome.exit_code == 0
    assert "question 3" in outcome.stdout and "3 disagreements (not marked" in outcome.stdout
    assert "' cat' (0.75) -> ' dog' (0.50)" in outcome.stdout
    assert len(specl("store", "show", "03", "--json").json["disagreements"]) == 3


def test_unknown_or_ambiguous_id_is_one_sentence(specl, filled):
    for id in ("nobody", "0"):
        outcome = specl("store", "show", id)
        assert outcome.exit_code == 1 and "no single generation begins with" in outcome.stderr


# ------------------------------------------------------------------------------------------------ export
def test_jsonl_has_the_documented_shape(specl, filled, tmp_path):
    rows = specl("store", "export", "--jsonl").lines
    assert list(rows[0]) == ["id", "prompt", "target_output", "acceptance_rate", "timestamp", "disagreements"]
    assert len(rows) == 10 and len(rows[9]["disagreements"]) == 9
    specl("store", "export", "--jsonl", "--failures", "--out", tmp_path / "f.jsonl")
    assert len((tmp_path / "f.jsonl").read_text().splitlines()) == 5


def test_export_wants_one_form_and_a_place(specl, filled, tmp_path):
    assert specl("store", "export").exit_code == 2
    assert specl("store", "export", "--jsonl", "--parquet").exit_code == 2
    assert specl("store", "export", "--parquet").exit_code == 2
    outcome = specl("store", "export", "--jsonl", "--out", tmp_path / "no" / "where")
    assert outcome.exit_code == 2 and "there is no folder" in outcome.stderr


def test_parquet_holds_the_top_k_logprobs(specl, filled, tmp_path):
    from pyarrow import parquet

    path = tmp_path / "g.parquet"
    assert specl("store", "export", "--parquet", "--out", path).exit_code == 0
    rows = parquet.read_table(path).to_pylist()
    assert [row["id"] for row in rows] == [record.id for record in filled]
    assert rows[0]["output_tokens"] == [1, 2, 3, 4, 5]
    assert rows[0]["top_ids"] == [[0, 1, 2, 3]] * 5
    assert np.allclose(rows[0]["top_logprobs"], np.log(0.2), atol=1e-3)
    assert rows[9]["disagreements"][8]["draft_text"] == " cat" and rows[9]["disagreements"][8]["context_tokens"] == [
        7,
        8,
        9,
    ]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["g.parquet"]


def test_parquet_without_pyarrow_says_what_to_install(specl, filled, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    outcome = specl("store", "export", "--parquet", "--out", tmp_path / "g.parquet")
    assert outcome.exit_code == 2 and "pip install 'speclora[parquet]'" in outcome.stderr
    assert not (tmp_path / "g.parquet").exists()


# ------------------------------------------------------------------------------------------------ import
def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_import_without_a_collector_stores_under_its_lock(specl, tmp_path):
    file = write(tmp_path / "in.jsonl", LINE, LINE | {"id": "other"})
    outcome = specl("store", "import", "--jsonl", file, "--text-only")
    assert outcome.exit_code == 0, outcome.stderr
    assert "2 generations stored, 0 of them to learn from" in outcome.stdout
    row = Store(find_paths().store, read_only=True).generation("from-elsewhere")
    assert row.acceptance_rate == 0.35 and row.created == "2026-01-31T12:00:00Z"
    assert row.disagreements[0].target_token == 6
    assert not is_locked(find_paths().run, "collector")


def test_import_of_an_export_gives_the_same_export(specl, filled, tmp_path, monkeypatch):
    file = tmp_path / "g.jsonl"
    specl("store", "export", "--jsonl", "--out", file)
    assert "0 generations stored" in specl("store", "import", "--jsonl", file, "--text-only").stdout
    monkeypatch.setenv("SPECL_VAR", str(tmp_path / "second"))
    assert "10 generations stored" in specl("store", "import", "--jsonl", file, "--text-only").stdout
    assert specl("store", "export", "--jsonl").stdout == file.read_text()


def test_bad_line_is_named_and_nothing_is_imported(specl, tmp_path):
    file = write(tmp_path / "in.jsonl", LINE, LINE | {"id": "b", "acceptance_rate": 7}, {"prompt": "x"}, [1])
    outcome = specl("store", "import", "--jsonl", file, "--text-only")
    assert outcome.exit_code == 2 and not find_paths().store.exists()
    assert "in.jsonl:2: acceptance_rate" in outcome.stderr and "in.jsonl:3: target_output" in outcome.stderr
    assert "in.jsonl:4: not a JSON object" in outcome.stderr and "Traceback" not in outcome.stderr


def test_a_missing_file_is_one_sentence(specl, tmp_path):
    outcome = specl("store", "import", "--jsonl", tmp_path / "none.jsonl")
    assert outcome.exit_code == 2 and "cannot be read" in outcome.stderr


def test_imports_obey_redaction(specl, tmp_path, monkeypatch):
    settings = tmp_path / "s.yaml"
    settings.write_text("records: {redact: ['Because']}\n")
    monkeypatch.setenv("SPECL_CONFIG", str(settings))
    specl("store", "import", "--jsonl", write(tmp_path / "in.jsonl", LINE), "--text-only")
    row = Store(find_paths().store, read_only=True).generation("from-elsewhere")
    assert row.output == "[redacted] of it." and row.disagreements == []


def test_target_probs_make_an_import_trainable(tiny):
    target, prompt = tiny(), [5, 6, 7, 8]
    own = list(prompt)
    import mlx.core as mx

    for _ in range(6):
        own.append(int(mx.argmax(target.logits(target.hidden_states(mx.array([own]), target.new_cache())[0, -1]))))
    scored = text_logprobs(target, "text", prompt, own[4:], 8)
    assert scored.greedy and scored.top_k.k == 8
    ids = np.frombuffer(scored.top_k.ids, "<u4").reshape(-1, 8)
    assert ids[:, 0].tolist() == own[4:]
    weights = np.exp(np.frombuffer(scored.top_k.logprobs, "<f2").astype(float)).reshape(-1, 8).sum(1)
    assert np.allclose(weights + np.frombuffer(scored.top_k.tail, "<f2"), 1, atol=0.01)
    changed = [(own[4] + 1) % 97, *own[5:]]
    assert not text_logprobs(target, "text", prompt, changed, 8).greedy
    record = to_generation(parse(json.dumps(LINE)), scored)
    store = Store(find_paths().create().store)
    assert store.add_rows([to_row(record)]) == ["from-elsewhere"]
    assert [row.id for row in store.generation_summaries(5)] == ["from-elsewhere"]
    assert store.generations(["from-elsewhere"])[0].temperature == 0.0
    store.close()


def test_disagreements_are_spelled_only_with_matching_tokenizer(tiny):
    item = parse(json.dumps(LINE))  # at position 1: 5 drafted, 6 right
    decode = tiny().tokenizer.decode
    same = with_token_texts(item, text_logprobs(tiny(), "text", [5, 6], [9, 6, 9], 8), decode).disagreements[0]
    assert (same.draft_text, same.target_text) == (decode([5]), decode([6]))
    other = with_token_texts(item, text_logprobs(tiny(), "text", [5, 6], [9, 9, 9], 8), decode).disagreements[0]
    assert (other.draft_text, other.target_text) == ("", "")


def test_too_long_for_the_target_stays_text(tiny):
    assert text_logprobs(tiny(), "text", [5] * 200, [6] * 200, 8) is None


@pytest.mark.parametrize(
    "change",
    [
        {"timestamp": "now"},
        {"disagreements": [{}]},
        {"prompt": ""},
        {"disagreements": 3},
        {"id": "../up"},
        {"id": "x" * 200},
    ],
)
def test_parse_refuses(change):
    with pytest.raises(ValueError):
        parse(json.dumps(LINE | change))


def test_import_without_id_twice_is_one_record():
    bare = {k: v for k, v in LINE.items() if k != "id"}
    assert parse(json.dumps(bare)).id == parse(json.dumps(bare)).id

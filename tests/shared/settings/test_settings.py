"""Settings: every mistake in a file is one sentence with its file, its line, its key and
what is allowed.
"""

from itertools import pairwise
from pathlib import Path

import pytest

from specl.shared.errors import ConfigError
from specl.shared.settings.load import load_settings, parse_settings, settings_document
from specl.shared.settings.schema import Settings

FILE = Path("settings.yaml")


def said(text):
    with pytest.raises(ConfigError) as caught:
        parse_settings(text, FILE)
    return str(caught.value)


def test_empty_file_is_all_defaults():
    assert parse_settings("", FILE) == parse_settings("# nothing\n", FILE) == Settings()
    changed = parse_settings("speculative: {num_draft_tokens: 3}\n", FILE)
    assert changed.speculative.num_draft_tokens == 3
    assert changed.training == Settings().training


ODD = ["int", "interval", "integer_steps", "constrained", "constrained_k", "constrained-int", "literal[x]", "list[str]"]


@pytest.mark.parametrize("name", [*ODD, "str", "function-after", "model", "0", "a b", "é"])
def test_unknown_key_is_reported_at_every_depth(name):
    assert said(f'"{name}": 1\n').startswith(f"settings.yaml:1: unknown setting `{name}`")
    assert said(f'training:\n  "{name}": 1\n').startswith(f"settings.yaml:2: unknown setting `training.{name}`")
    deep = said(f'training:\n  lora:\n    rank: 4\n    "{name}": 1\n')
    assert deep.startswith(f"settings.yaml:4: unknown setting `training.lora.{name}`")


def test_unknown_key_comes_with_a_guess():
    assert "did you mean `rank`?" in said("training: {lora: {rnak: 3}}\n")
    assert "known here: level" in said("logging: {zzz: 3}\n")


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("speculative:\n  num_draft_tokens: often\n", 2, "speculative.num_draft_tokens"),
        ("speculative:\n  num_draft_tokens: 99\n", 2, "speculative.num_draft_tokens"),
        ("training:\n  lora:\n    target_modules: [q_proj, 5]\n", 3, "training.lora.target_modules.1"),
        ("training:\n  lora:\n    target_modules: some\n", 3, "training.lora.target_modules"),
        ("training:\n  batch_size: {int: 3}\n", 2, "training.batch_size"),
        ("speculative:\n  num_draft_tokens: {constrained-int: 3}\n", 2, "speculative.num_draft_tokens"),
        ("memory:\n  max_kv_cache_tokens: 3\n", 2, "memory.max_kv_cache_tokens"),
        ("records:\n  redact: ['(']\n", 2, "records.redact"),
        ("training: 5\n", 1, "training"),
    ],
)
def test_wrong_value_names_key_and_line(text, line, key):
    sentences = said(text).splitlines()
    assert any(sentence.startswith(f"settings.yaml:{line}: `{key}`: ") for sentence in sentences), sentences
    named = {sentence.split("`")[1] for sentence in sentences}
    assert all(key.startswith(name) for name in named), named  # one sentence for each kind of value that would do


def test_key_that_is_not_text_is_reported():
    assert "settings.yaml" in said("1: 2\n")
    assert "settings.yaml" in said("training: {null: 2}\n")


def test_all_settings_problems_are_reported_together():
    text = said("int_a: 1\ntraining:\n  constrained_b: 2\n  batch_size: many\n")
    assert sorted(line.split(":")[1] for line in text.splitlines()) == ["1", "3", "4"]
    assert "`int_a`" in text and "`training.constrained_b`" in text and "`training.batch_size`" in text


@pytest.mark.parametrize("code", [0, 1, 7, 8, 0x0B, 0x1B, 0x7F, 0x80, 0x9F, 0xFFFE])
def test_control_character_is_reported_with_its_line(code):
    text = said(f"training:\n  batch_size: 2\n  loss: {{type: c{chr(code)}e}}\n")
    assert text == f"settings.yaml:3: not YAML: the character U+{code:04X} is not allowed"


@pytest.mark.parametrize(
    "text",
    [
        "a: [1\n",
        "a: b: c\n",
        "\ta: 1\n",
        "a: 1\na: 2\n",
        "logging: {level: 2026-99-99}\n",
        "logging: {level: 0o9}\n",
        "a: &x [*x]\n",
        "a: *nowhere\n",
        "[" * 1000,
        "- 1\n",
        "just words",
        "--- 1\n--- 2\n",
        "a: !!python/object/apply:os.system ['true']\n",
        "logging: {level: !!binary '~~~'}\n",
        "logging: !!omap {level: 3}\n",
        "%YAML 9.9\n---\na: 1\n",
        "training: {learning_rate: .nan}\n",
    ],
)
def test_non_settings_file_is_a_user_error(text):
    assert "settings.yaml" in said(text)


def test_missing_or_binary_file_is_one_sentence(tmp_path):
    for path, data in ((tmp_path / "none.yaml", None), (tmp_path / "bytes.yaml", b"\xff\xfe\x00")):
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(ConfigError) as caught:
            load_settings(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError):
        load_settings(tmp_path)


def test_every_documented_key_accepts_its_default():
    rows = [line for line in settings_document().splitlines() if line.startswith("| `")]
    assert len(rows) > 50
    for row in rows:
        keys = row.split("`")[1].split(".")
        value = Settings()
        for key in keys:
            value = getattr(value, key)


@pytest.mark.parametrize(
    "text",
    [
        "gateway: {token: s3cret}\n",
        "gateway: {token: [s3cret]}\n",
        "gateway: [token, s3cret]\n",
        "gateway: s3cret\n",
        "gateway:\n  token: s3cret-s3cret-s3cret\n  token: s3cret-s3cret-other\n",
        "gateway: {tokn: s3cret-s3cret-s3cret}\n",
        "gateway: {token: s3cret, port: far}\n",
    ],
)
def test_a_secret_is_never_repeated(text):
    with pytest.raises(ConfigError) as caught:
        parse_settings(text, FILE)
    assert "s3cret" not in f"{caught.value} {caught.value.hint}" and str(caught.value).startswith("settings.yaml:")


def test_logged_settings_do_not_show_the_token():
    settings = parse_settings("gateway: {token: s3cret-s3cret-s3cret}\n", FILE)
    assert settings.gateway.token and "s3cret" not in f"{settings!r} {settings}"


def test_settings_know_the_losses_of_learning():
    from specl.shared.learning import losses
    from specl.shared.settings import schema

    assert tuple(losses.LOSSES) == tuple(schema.LOSSES)


@pytest.mark.parametrize("wrong", ["*i", "[1, *i]", "{a: *i}", f"'{'x' * 5_000_000}'"])
def test_wrong_value_is_shown_in_short(wrong):
    """Aliases make each level ten times as long: the value itself has a thousand million letters."""
    levels = ["a: &a [lol]"] + [f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in pairwise("abcdefghi")]
    with pytest.raises(ConfigError) as error:
        parse_settings("\n".join(levels) + f"\nserving: {{max_active: {wrong}}}\n", FILE)
    assert len(str(error.value)) < 5000 and "serving.max_active" in str(error.value)


def test_small_wrong_value_is_shown_whole():
    with pytest.raises(ConfigError, match=r"not \['a', \{'b': 1\}\]"):
        parse_settings("serving: {max_active: [a, {b: 1}]}\n", FILE)

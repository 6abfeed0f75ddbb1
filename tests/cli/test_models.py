"""`specl-ctl models`: importing and finding, and every mistake as one sentence with exit code 2."""

import json

import pytest
from click.testing import CliRunner

from specl.cli.main import main
from tests.shared.models import tiny_gguf


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SPECL_MODELS", str(tmp_path / "models"))
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)


def run(capsys, *arguments):
    code = 0
    try:
        main(list(arguments))
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_imported_gguf_is_named_by_the_settings(tmp_path, capsys, monkeypatch):
    tiny_gguf.write(tmp_path / "Tiny Llama.gguf")
    code, out, err = run(capsys, "models", "import", str(tmp_path / "Tiny Llama.gguf"), "--quantize", "8", "--json")
    assert code == 0 and "converting Tiny Llama.gguf" in err
    assert json.loads(out) == {"name": "tiny-llama", "path": str(tmp_path / "models" / "tiny-llama")}
    (tmp_path / "s.yaml").write_text("models: {target: {name: tiny-llama}, draft: {name: null}}\n")
    monkeypatch.setenv("SPECL_CONFIG", str(tmp_path / "s.yaml"))
    code, out, _ = run(capsys, "models", "list", "--json")
    assert code == 0 and json.loads(out)["target"]["path"] == str(tmp_path / "models" / "tiny-llama")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere.gguf"], "there is no file nowhere.gguf"),
        (["ollama:nothing"], "there is no model 'ollama:nothing' here"),
        (["{cut}"], "is not a whole GGUF file"),
        (["{good}", "--name", "../x"], "a model cannot be called '../x'"),
        (["{good}", "--name", "smollm2-135m"], "a model cannot be called"),
    ],
)
def test_mistake_is_one_sentence_and_exit_code_2(tmp_path, capsys, arguments, reason):
    tiny_gguf.write(tmp_path / "good.gguf")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "good.gguf").read_bytes()[:5000])
    filled = [argument.format(good=tmp_path / "good.gguf", cut=tmp_path / "cut.gguf") for argument in arguments]
    code, out, err = run(capsys, "models", "import", *filled)
    assert code == 2 and out == "" and reason in err and "Traceback" not in err
    assert err.startswith("specl-ctl: ")


def test_importing_twice_under_one_name_is_refused(tmp_path, capsys):
    tiny_gguf.write(tmp_path / "a.gguf")
    assert run(capsys, "models", "import", str(tmp_path / "a.gguf"))[0] == 0
    code, _, err = run(capsys, "models", "import", str(tmp_path / "a.gguf"))
    assert code == 2 and "there is already a model a at" in err


def test_what_others_keep_is_listed(tmp_path, capsys):
    code, out, _ = run(capsys, "models", "list", "--found")
    assert code == 0 and "nothing of Ollama's or LM Studio's is here" in out
    folder = tmp_path / "home" / ".lmstudio" / "models" / "pub" / "repo"
    folder.mkdir(parents=True)
    tiny_gguf.write(folder / "a.gguf")
    code, out, _ = run(capsys, "models", "list", "--found")
    assert code == 0 and out.startswith("lmstudio:pub/repo/a.gguf") and str(folder / "a.gguf") in out
    (item,) = json.loads(run(capsys, "models", "list", "--found", "--json")[1])
    assert item["name"] == "lmstudio:pub/repo/a.gguf" and item["format"] == "gguf"
    code, out, _ = run(capsys, "models", "import", "lmstudio:pub/repo/a.gguf", "--json")
    assert code == 0 and json.loads(out)["name"] == "a"


def test_help_teaches():
    from specl.cli.models import models

    text = CliRunner().invoke(models, ["import", "--help"]).output
    assert "Q4_K" in text and "ollama:llama3.2:1b" in text and "[default: keep]" in text.replace("\n", " ")

"""What Ollama and LM Studio keep is found by the names their users know, and used where it lies."""

import hashlib
import json

import pytest
from gguf import GGMLQuantizationType as Kind

from specl.shared.errors import ModelError
from specl.shared.models.find import ensure_model, find_model
from specl.shared.models.load import load
from specl.shared.models.local_models import list_local_models, list_models_under, model_named
from tests.shared.models import tiny_gguf


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def ollama_pull(folder, name, data, media="application/vnd.ollama.image.model"):
    """What `ollama pull` leaves: a blob by its digest, and a manifest that names it."""
    digest = hashlib.sha256(data).hexdigest()
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    (folder / "blobs" / f"sha256-{digest}").write_bytes(data)
    manifest = folder / "manifests" / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    layers = [
        {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:00", "size": 1},
        {"mediaType": media, "digest": f"sha256:{digest}", "size": len(data)},
    ]
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    return folder / "blobs" / f"sha256-{digest}"


def names(items):
    return [item.name for item in items]


def test_ollama_models_are_found_by_ollama_names(home):
    folder = home / ".ollama" / "models"
    blob = ollama_pull(folder, "registry.ollama.ai/library/llama3.2/1b", b"GGUFa")
    ollama_pull(folder, "registry.ollama.ai/library/qwen2.5/latest", b"GGUFbb")
    ollama_pull(folder, "registry.ollama.ai/someone/fine/v2", b"GGUFc")
    ollama_pull(folder, "hf.co/owner/repo/Q4_K_M", b"GGUFd")
    found = list_models_under(home)
    assert names(found) == [
        "ollama:hf.co/owner/repo:Q4_K_M",
        "ollama:llama3.2:1b",
        "ollama:qwen2.5:latest",
        "ollama:someone/fine:v2",
    ]
    assert model_named("ollama:llama3.2:1b", found).path == blob and model_named("ollama:llama3.2:1b", found).size == 5
    assert model_named("ollama:qwen2.5", found).name == "ollama:qwen2.5:latest"


def test_partial_and_odd_models_are_ignored(home, tmp_path):
    folder = home / ".ollama" / "models"
    blob = ollama_pull(folder, "registry.ollama.ai/library/gone/1b", b"GGUFa")
    blob.unlink()
    ollama_pull(folder, "registry.ollama.ai/library/lora/1b", b"GGUFz", media="application/vnd.ollama.image.adapter")
    (tmp_path / "secret").write_bytes(b"GGUF")
    for number, text in enumerate(
        ["", "[]", "7", '{"layers": 3}', '{"layers": [{"mediaType": 1}]}', "[" * 100_000]
        + [
            json.dumps({"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": d}]})
            for d in ("../../../../secret", 5, None)
        ]
    ):
        manifest = folder / "manifests" / "registry.ollama.ai" / "library" / "odd" / str(number)
        manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_text(text)
    assert list_models_under(home) == []


def test_ollama_models_variable_names_another_folder(home, tmp_path, monkeypatch):
    ollama_pull(tmp_path / "big-disk", "registry.ollama.ai/library/llama3.2/1b", b"GGUFa")
    assert list_local_models() == []
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "big-disk"))
    assert names(list_local_models()) == ["ollama:llama3.2:1b"]


def test_lm_studio_models_are_found_in_both_folders(home):
    new, old = home / ".lmstudio" / "models", home / ".cache" / "lm-studio" / "models"
    for folder, path in (
        (new, "pub/repo/a.gguf"),
        (new, "pub/repo/mmproj-a.gguf"),
        (old, "pub/older/b.gguf"),
        (old, "pub/repo/a.gguf"),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"GGUF")
    mlx = new / "mlx-community" / "Qwen2.5-0.5B-Instruct-4bit"
    mlx.mkdir(parents=True)
    (mlx / "config.json").write_text("{}")
    (mlx / "model.safetensors").write_bytes(bytes(100))
    (new / "pub" / "empty").mkdir()
    found = list_models_under(home)
    assert names(found) == [
        "lmstudio:mlx-community/Qwen2.5-0.5B-Instruct-4bit",
        "lmstudio:pub/older/b.gguf",
        "lmstudio:pub/repo/a.gguf",
    ]
    assert [item.format for item in found] == ["mlx", "gguf", "gguf"]
    assert model_named("lmstudio:pub/repo/a.gguf", found).path == new / "pub" / "repo" / "a.gguf"
    assert ensure_model("lmstudio:mlx-community/Qwen2.5-0.5B-Instruct-4bit", home / "m") == mlx


def test_ollama_model_is_served_by_its_name(home, tmp_path):
    tiny_gguf.write(tmp_path / "m.gguf", "qwen2", Kind.Q8_0)
    blob = ollama_pull(
        home / ".ollama" / "models", "registry.ollama.ai/library/tiny/latest", (tmp_path / "m.gguf").read_bytes()
    )
    assert find_model("ollama:tiny", tmp_path / "models") == blob
    model = load("ollama:tiny", tmp_path / "models")
    assert model.config["model_type"] == "qwen2" and model.path.parent == tmp_path / "models" / "converted"
    assert load(str(blob), tmp_path / "models").path == model.path == find_model("ollama:tiny", tmp_path / "models")


def test_unknown_name_is_one_sentence(home):
    with pytest.raises(ModelError, match="there is no model 'ollama:nothing:1b' here") as caught:
        ensure_model("ollama:nothing:1b", home)
    assert "models list --found" in caught.value.hint


def test_lm_studio_says_itself_where_its_models_are(home, tmp_path):
    elsewhere, disk = tmp_path / "lm", tmp_path / "disk"
    (elsewhere / "models" / "one" / "a").mkdir(parents=True)
    (elsewhere / "models" / "one" / "a" / "a.gguf").write_bytes(b"GGUF")
    (disk / "two" / "b").mkdir(parents=True)
    (disk / "two" / "b" / "b.gguf").write_bytes(b"GGUF")
    (home / ".lmstudio-home-pointer").write_text(f"{elsewhere}\n")
    (elsewhere / "settings.json").write_text(json.dumps({"downloadsFolder": str(disk)}))
    assert names(list_models_under(home)) == ["lmstudio:one/a/a.gguf", "lmstudio:two/b/b.gguf"]


@pytest.mark.parametrize("said", ["", "models", "\0", "/nowhere"])
def test_a_pointer_that_points_nowhere_is_passed_over(home, monkeypatch, said):
    monkeypatch.chdir(home)
    (home / "models" / "one" / "a").mkdir(parents=True)
    (home / "models" / "one" / "a" / "a.gguf").write_bytes(b"GGUF")
    (home / ".lmstudio-home-pointer").write_text(said)
    assert list_models_under(home) == []


def test_the_ollama_of_the_whole_system(home, tmp_path):
    ollama_pull(tmp_path / "service", "registry.ollama.ai/library/llama3.2/1b", b"GGUFa")
    blob = ollama_pull(home / ".ollama" / "models", "registry.ollama.ai/library/llama3.2/1b", b"GGUFmine")
    ollama_pull(tmp_path / "service", "registry.ollama.ai/library/qwen2.5/latest", b"GGUFbb")
    found = list_models_under(home, service=tmp_path / "service")
    assert names(found) == ["ollama:llama3.2:1b", "ollama:qwen2.5:latest"] and found[0].path == blob
    (tmp_path / "service" / "manifests").chmod(0)
    assert "ollama:llama3.2:1b" in names(list_models_under(home, service=tmp_path / "service"))

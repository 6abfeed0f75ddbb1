"""A real engine around two random one-layer Llamas with a tokenizer of one token a character: milliseconds a token.

`install` puts it where the daemons load their models; everything else in those processes is the real thing. Read from the
environment at load: SPECL_TEST_TOKEN_MS slows every forward pass, SPECL_TEST_CHECKPOINT_S sets how often training saves,
SPECL_TEST_LOOK_S how often CURRENT is looked at, SPECL_TEST_DISK_RETRY_S how soon a run that found no room is tried again,
SPECL_TEST_RISING makes every score better than the last.
"""

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

CHARACTERS = 128
STOP = 3


class CharacterTokenizer:
    """Token n is the ASCII character n; what is not printable reads as a dot."""

    eos_token_ids = (STOP,)
    all_special_tokens = ()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) if ord(c) < CHARACTERS else ord("?") for c in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(t) if 32 <= t < 127 else "." for t in tokens)

    def apply_chat_template(self, messages: list[dict[str, Any]], tokenize: bool, add_generation_prompt: bool) -> str:
        return "".join(f"<{m['role']}>{m['content']}\n" for m in messages) + "<assistant>"

    def get_vocab(self) -> dict[str, int]:
        return {chr(n): n for n in range(CHARACTERS)}


def fake_model(name: str, seed: int, near: Any = None) -> Any:
    """A LanguageModel of 20,000 random weights; with `near`, that model's weights and a little noise."""
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.models.llama import Model, ModelArgs

    from specl.shared.models.language_model import LanguageModel

    @dataclass(slots=True)
    class Slowed(LanguageModel):
        delay_s: float = 0.0

        def hidden_states(self, ids: Any, cache: Any = None) -> Any:
            if self.delay_s:
                time.sleep(self.delay_s)
            return LanguageModel.hidden_states(self, ids, cache)

    mx.random.seed(seed)
    config = {
        "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "vocab_size": CHARACTERS,
        "max_position_embeddings": 4096, "tie_word_embeddings": False,
    }  # fmt: skip
    model = Model(ModelArgs.from_dict(config))
    model.update(tree_map(lambda w: w + 0.4 * mx.random.normal(w.shape), model.parameters()))
    if near is not None:
        model.update(tree_map(lambda w: w + 0.04 * mx.random.normal(w.shape), near.model.parameters()))
    mx.eval(model.parameters())
    delay = float(os.environ.get("SPECL_TEST_TOKEN_MS", "0")) / 1000 if near is None else 0.0
    return Slowed(name, Path("."), model, CharacterTokenizer(), config, f"fake-{name}", "characters", delay_s=delay)


def fake_engine(settings: Any, models: Path, say: Any = None, training: bool = False, **more: Any) -> Any:
    """What `load_engine` gives, without loading anything."""
    from specl.shared.engine.core import EngineCore
    from specl.shared.loading.engine import engine_options

    target = fake_model("target", 1)
    return EngineCore(target, fake_model("draft", 2, near=target), engine_options(settings))


def install() -> None:
    """Put the fake where the daemons look for their models."""
    import specl.daemons.inference.decode_thread as decode_thread
    import specl.daemons.trainer.schedule as schedule
    import specl.daemons.trainer.scoring as scoring
    import specl.daemons.trainer.training_loop as training_loop
    import specl.daemons.trainer.worker as trainer

    decode_thread.load_engine = trainer.load_engine = fake_engine
    training_loop.CHECKPOINT_S = float(os.environ.get("SPECL_TEST_CHECKPOINT_S", training_loop.CHECKPOINT_S))
    schedule.DISK_RETRY_S = float(os.environ.get("SPECL_TEST_DISK_RETRY_S", schedule.DISK_RETRY_S))
    decode_thread.IDLE_TICK_S = float(os.environ.get("SPECL_TEST_LOOK_S", decode_thread.IDLE_TICK_S))
    if os.environ.get("SPECL_TEST_RISING"):
        scoring.agreement = _rising(scoring.agreement)


def _rising(score: Any) -> Any:
    """Agreement that rises with every look: random models learn little, and publishing is what is to be seen."""
    looks = [0]

    def look(*arguments: Any, **named: Any) -> Any:
        looks[0] += 1
        found = score(*arguments, **named)
        return replace(found, hits=found.positions * min(1.0, 0.1 + 0.04 * looks[0]))

    return look


def make_adapter(
    folder: Path, id: str, scale: float = 0.05, base: str = "fake-draft", nan: bool = False, cut: int = 0
) -> Any:
    """Write an adapter for the fake draft the way the trainer does, unpublished; its scratch folder and manifest."""
    import mlx.core as mx

    from specl.shared.adapters.registry import Adapters, Manifest
    from specl.shared.adapters.tensors import write_tensors
    from specl.shared.models.lora import LoraShape, choose_layers, linear_layers

    module = fake_model("draft", 2).model
    shape = LoraShape(4, 8.0, 0.0, choose_layers(module, "all"))
    mx.random.seed(int(id))
    weights = {}
    for key in shape.keys:
        out, inner = linear_layers(module)[key].weight.shape
        weights[f"{key}.lora_a"] = scale * mx.random.normal((inner - cut, 4))
        weights[f"{key}.lora_b"] = scale * mx.random.normal((4, out))
    if nan:
        name = f"{shape.keys[0]}.lora_a"
        weights[name] = mx.full(weights[name].shape, float("nan"))
    adapters = Adapters(folder)
    scratch = adapters.scratch(id)
    write_tensors(scratch, shape, weights, None)
    manifest = Manifest(
        id=id, kind="lora", created_at=time.time(), base_model="draft", base_fingerprint=base,
        target_fingerprint="fake-target", tokenizer_fingerprint="characters", parent_id="", training_run_id="run",
        rank=4, alpha=8.0, modules=list(shape.keys), change_norm=1.0, metrics={"heldout_after": 0.5},
        training={"generations": []},
    )  # fmt: skip
    return scratch, manifest


def publish_adapter(folder: Path, id: str, **more: Any) -> Path:
    """Write and publish an adapter; CURRENT names it."""
    from specl.shared.adapters.registry import Adapters

    scratch, manifest = make_adapter(folder, id, **more)
    return Adapters(folder).publish(scratch, manifest)


if __name__ == "__main__":  # `python -m tests.harness.fake_models FOLDER ID`: publishing, to be killed at a named point
    import sys

    publish_adapter(Path(sys.argv[1]), sys.argv[2])

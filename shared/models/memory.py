"""How much memory models, caches and training will take, told before anything is loaded, and whether this machine has it.

Arithmetic over config.json and the headers of the weights files; nothing is loaded. Measured against what really is taken
with the built-in model on Linux (docs/models.md); on a Mac it is arithmetic only. Knows no daemons.
"""

import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specl.shared.errors import ModelError
from specl.shared.settings.schema import Settings

PROCESS = 200e6  # Python, MLX and the libraries (measured: 90 MB imported, the rest as buffers come)
COLLECTOR = 120e6
SHARE = 0.9  # of the machine's memory, where no limit is set
TRAINING_TOKENS = 256  # of one forward and backward (the trainer's pieces)
ADAM = 4  # weight, gradient and two moments of what trains, in fp32
MAX_HEADER = 64 << 20


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What is known of a model without loading it: weights, how they lie in its files, and the shape of a layer."""

    parameters: int
    file_bytes: int
    quantised: bool
    layers: int
    hidden: int
    intermediate: int
    kv_width: int
    vocabulary: int

    def weights(self, dense_fp32: bool, native: bool) -> float:
        """Bytes when loaded. Dense fp32 on CPU keeps the blocks beside it: unpacked, and as the kernels read them."""
        if not dense_fp32:
            return float(self.file_bytes)
        beside = (
            (self.parameters * 1.25 + self.file_bytes if self.quantised else 2.0 * self.parameters) if native else 0
        )
        return 4.0 * self.parameters + beside

    def cache(self, tokens: int, dense_fp32: bool) -> float:
        """Bytes of keys and values for so many tokens."""
        return 2.0 * tokens * self.layers * self.kv_width * (4 if dense_fp32 else 2)

    def lora(self, rank: int) -> float:
        """Numbers in A and B on every linear layer."""
        sides = 4 * self.hidden + 2 * (self.hidden + self.kv_width) + 3 * (self.hidden + self.intermediate)
        return float(rank * self.layers * sides)

    def activations(self, checkpointing: bool) -> float:
        """Bytes that one forward keeps for its backward: ten rows of the width and three of the inner one a layer, the
        logits four times.
        """
        layer = TRAINING_TOKENS * (10 * self.hidden + 3 * self.intermediate) * 4.0
        kept = layer + self.layers * TRAINING_TOKENS * self.hidden * 4.0 if checkpointing else layer * self.layers
        return kept + TRAINING_TOKENS * self.vocabulary * 4 * 4.0


@dataclass(frozen=True, slots=True)
class Machine:
    """Bytes of memory here, and whether models are held dense in fp32 (CPU) with native kernels beside."""

    memory: float
    dense_fp32: bool
    native: bool


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes by what they are for: `serving` of the inference daemon (and collector), `training` on top of that."""

    serving: dict[str, float] = field(default_factory=dict)
    training: dict[str, float] = field(default_factory=dict)

    def total(self, training: bool) -> float:
        """All together, with or without a training run."""
        return sum(self.serving.values()) + (sum(self.training.values()) if training else 0.0)

    def describe(self) -> str:
        """`serving 1.1 GB (target 0.8, ...) and training 1.2 GB (...)`."""
        parts = []
        for name, items in (("serving", self.serving), ("training", self.training)):
            if items:
                parts.append(f"{name} {sum(items.values()) / 1e9:.1f} GB ({_listed(items)})")
        return " and ".join(parts)


def _listed(items: dict[str, float]) -> str:
    return ", ".join(f"{what} {size / 1e9:.1f}" for what, size in items.items())


def estimate(target: ModelSize, draft: ModelSize | None, settings: Settings, machine: Machine) -> Estimate:
    """What serving and training with these models will take here. Pure."""
    fp32, tokens = machine.dense_fp32, settings.memory.max_kv_cache_tokens
    weights = {"target": target.weights(fp32, machine.native)}
    caches = target.cache(tokens, fp32)
    if draft is not None:
        weights["draft"] = draft.weights(fp32, machine.native)
        caches += draft.cache(tokens, fp32)
    serving = weights | {"caches": caches, "programs": PROCESS + COLLECTOR}
    if draft is None:
        return Estimate(serving)
    training = settings.training
    learning = draft.lora(training.lora.rank) * 4 * ADAM + draft.activations(settings.memory.gradient_checkpointing)
    # the trainer is a process of its own: it reads the target's states, so it holds both models again
    return Estimate(serving, weights | {"learning": learning, "programs": PROCESS})


# ---------------------------------------------------------------------------------------------------- files and machine
def size_of(folder: Path) -> ModelSize:
    """A model's size from its config and the headers of its weights. Raises ModelError where they cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        files = sorted(folder.glob("model*.safetensors"))
        tensors = dict(entry for file in files for entry in _entries(file))
        groups = config.get("quantization") or {}
        parameters = sum(_elements(name, shape, tensors, groups) for name, shape in tensors.items())
        heads = int(config["num_attention_heads"])
        size = int(config.get("head_dim") or config["hidden_size"] // heads)
        return ModelSize(
            parameters=parameters,
            file_bytes=sum(file.stat().st_size for file in files),
            quantised=any(name.endswith(".scales") for name in tensors),
            layers=int(config.get("num_hidden_layers", 1)),  # a head is one layer
            hidden=int(config["hidden_size"]),
            intermediate=int(config["intermediate_size"]),
            kv_width=int(config.get("num_key_value_heads") or heads) * size,
            vocabulary=int(config.get("hot_size") or config["vocab_size"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, struct.error) as error:
        raise ModelError(f"the size of the model at {folder} cannot be told: {error!r}") from error


def _entries(file: Path) -> Iterator[tuple[str, list[int]]]:
    """Names and shapes of a safetensors file's tensors."""
    with open(file, "rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        if length > MAX_HEADER:
            raise ValueError(f"{file.name} is not a safetensors file")
        header = json.loads(handle.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            yield name, entry["shape"]


def _elements(name: str, shape: list[int], tensors: dict[str, list[int]], groups: dict[str, Any]) -> int:
    """Weights that a tensor stands for: a packed one has as many as its scales have groups."""
    if name.endswith((".scales", ".biases")):
        return 0
    module = name.removesuffix(".weight")
    if f"{module}.scales" not in tensors:
        return math.prod(shape)
    own = groups.get(module)
    group = own["group_size"] if isinstance(own, dict) else groups.get("group_size", 64)
    return math.prod(tensors[f"{module}.scales"]) * int(group)


def this_machine(precision: str) -> Machine:
    """Physical memory, or less where this process may only have less (containers), and how models are held here."""
    from specl.shared import native
    from specl.shared.models.cpu_kernels import on_cpu

    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, float(Path(file).read_text()))
        except (OSError, ValueError):  # "max", or another system
            continue
    fp32 = precision == "fp32" or (precision == "auto" and on_cpu())
    return Machine(total, fp32, on_cpu() and native.available())


def limit(settings: Settings, machine: Machine) -> float:
    """Bytes that may be taken; infinity where the settings say not to look."""
    wish = settings.memory.limit_gb
    if wish == "none":
        return math.inf
    return SHARE * machine.memory if wish == "auto" else float(wish) * 1e9


def check(found: Estimate, settings: Settings, machine: Machine, training: bool) -> None:
    """Raises ModelError where serving, or with `training` both together, cannot fit."""
    needed, allowed = found.total(training), limit(settings, machine)
    if needed <= allowed:
        return
    what = "training while serving" if training else f"serving {settings.models.target.name}"
    detail = found.describe() if training else _listed(found.serving)
    raise ModelError(
        f"{what} needs about {needed / 1e9:.1f} GB ({detail}); "
        f"{allowed / 1e9:.1f} GB may be taken of this machine's {machine.memory / 1e9:.1f} GB",
        "take a smaller or more quantised model, lower memory.max_kv_cache_tokens, or set memory.limit_gb",
    )

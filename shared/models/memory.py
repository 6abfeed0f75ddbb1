"""Estimates the memory of models, caches and training before anything is loaded, and compares it
with this machine's.

Arithmetic over config.json and the headers of the weights files. Checked against the memory of a
real process with the built-in model on Linux (docs/models.md); on a Mac nobody has measured it.
Knows no daemons.
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

PROCESS_BYTES = 200e6  # Python, MLX and the libraries (measured: 90 MB after the imports, the rest in buffers)
COLLECTOR_BYTES = 120e6
AUTO_SHARE = 0.9  # of the machine's memory may be taken, where `memory.limit_gb` is auto
TRAINING_TOKENS = 256  # of one forward and backward of the trainer
ADAM_VALUES = 4  # fp32 numbers for each trained one: weight, gradient and two moments
MAX_HEADER = 64 << 20  # bytes of a safetensors header


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Sizes of a model, read without loading it. `file_bytes`: of its weights files; the rest are
    counts of numbers.
    """

    parameters: int
    file_bytes: int
    quantised: bool
    layers: int
    hidden: int
    intermediate: int
    kv_width: int
    vocabulary: int

    def weights(self, dense_fp32: bool, native: bool) -> float:
        """Bytes of the loaded weights. With native kernels, dense fp32 has a second copy in the
        kernels' formats, and that of a quantised model its unpacked blocks as well.
        """
        if not dense_fp32:
            return float(self.file_bytes)
        copies = self.parameters * 1.25 + self.file_bytes if self.quantised else 2.0 * self.parameters
        return 4.0 * self.parameters + (copies if native else 0)

    def cache(self, tokens: int, dense_fp32: bool) -> float:
        """Bytes of keys and values for `tokens` tokens."""
        return 2.0 * tokens * self.layers * self.kv_width * (4 if dense_fp32 else 2)

    def lora(self, rank: int) -> float:
        """Numbers in A and B of an adapter of this rank on every linear layer."""
        sides = 4 * self.hidden + 2 * (self.hidden + self.kv_width) + 3 * (self.hidden + self.intermediate)
        return float(rank * self.layers * sides)

    def activations(self, checkpointing: bool) -> float:
        """Bytes that one forward keeps for its backward: for each token and layer ten hidden and
        three intermediate rows, and four rows of logits. With gradient checkpointing, one layer and
        a hidden row of each other layer.
        """
        layer = TRAINING_TOKENS * (10 * self.hidden + 3 * self.intermediate) * 4.0
        layers = layer + self.layers * TRAINING_TOKENS * self.hidden * 4.0 if checkpointing else layer * self.layers
        return layers + TRAINING_TOKENS * self.vocabulary * 4 * 4.0


@dataclass(frozen=True, slots=True)
class Machine:
    """Bytes of this machine's memory, whether models are loaded as dense fp32, and whether native
    kernels are used.
    """

    memory: float
    dense_fp32: bool
    native: bool


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes by purpose. `serving`: of the inference daemon and the collector; `training`: what a
    training run adds.
    """

    serving: dict[str, float] = field(default_factory=dict)
    training: dict[str, float] = field(default_factory=dict)

    def total(self, training: bool) -> float:
        """The sum, with or without a training run."""
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
    """The memory that serving and training with these models will take on `machine`. Pure."""
    fp32, tokens = machine.dense_fp32, settings.memory.max_kv_cache_tokens
    weights = {"target": target.weights(fp32, machine.native)}
    caches = target.cache(tokens, fp32)
    if draft is not None:
        weights["draft"] = draft.weights(fp32, machine.native)
        caches += draft.cache(tokens, fp32)
    serving = weights | {"caches": caches, "programs": PROCESS_BYTES + COLLECTOR_BYTES}
    if draft is None:
        return Estimate(serving)
    training = settings.training
    learning = draft.lora(training.lora.rank) * 4 * ADAM_VALUES + draft.activations(
        settings.memory.gradient_checkpointing
    )
    # the trainer is another process, which reads the target's hidden states: it loads both models
    # again
    return Estimate(serving, weights | {"learning": learning, "programs": PROCESS_BYTES})


# ---------------------------------------------------------------------------------------------------- files and machine
def size_of(folder: Path) -> ModelSize:
    """A model's size from its config and the headers of its weights. Raises ModelError where they
    cannot be read.
    """
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
        raise ModelError(f"the size of the model at {folder} cannot be read: {error!r}") from error


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
    """Weights of a tensor; of a packed one, group size times the number of its scales."""
    if name.endswith((".scales", ".biases")):
        return 0
    module = name.removesuffix(".weight")
    if f"{module}.scales" not in tensors:
        return math.prod(shape)
    exception = groups.get(module)
    group = exception["group_size"] if isinstance(exception, dict) else groups.get("group_size", 64)
    return math.prod(tensors[f"{module}.scales"]) * int(group)


def this_machine(precision: str) -> Machine:
    """This machine's memory, or the limit of this process's container, and how models are loaded on
    it.
    """
    from specl.shared.models.cpu_kernels import on_cpu
    from specl.shared.native import available

    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, float(Path(file).read_text()))
        except (OSError, ValueError):  # "max", or another system
            continue
    fp32 = precision == "fp32" or (precision == "auto" and on_cpu())
    return Machine(total, fp32, on_cpu() and available())


def limit(settings: Settings, machine: Machine) -> float:
    """Bytes that may be taken; infinity where `memory.limit_gb` is none."""
    limit_gb = settings.memory.limit_gb
    if limit_gb == "none":
        return math.inf
    return AUTO_SHARE * machine.memory if limit_gb == "auto" else float(limit_gb) * 1e9


def check(estimated: Estimate, settings: Settings, machine: Machine, training: bool) -> None:
    """Raises ModelError where serving, or with `training` both together, do not fit."""
    needed, allowed = estimated.total(training), limit(settings, machine)
    if needed <= allowed:
        return
    what = "training while serving" if training else f"serving {settings.models.target.name}"
    detail = estimated.describe() if training else _listed(estimated.serving)
    raise ModelError(
        f"{what} needs about {needed / 1e9:.1f} GB ({detail}); "
        f"{allowed / 1e9:.1f} GB may be taken of this machine's {machine.memory / 1e9:.1f} GB",
        "take a smaller or more quantised model, lower memory.max_kv_cache_tokens, or set memory.limit_gb",
    )

"""The native kernels' figures: every ratio taken in one process, the sides by turns, medians of many short runs.

Run `python -m tests.bench.native [--gguf FILE]`: without the built-in model's GGUF a random model of its shape stands
in (same cost, no text to compare). llama.cpp is measured where llama-cpp-python is installed. Prints one line a figure.
"""

import argparse
import ctypes
import ctypes.util
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


def bind_openblas() -> str:
    """mlx's own BLAS is the reference one; a fair ordinary path has OpenBLAS. Before mlx is imported."""
    try:
        import scipy_openblas32 as blas
    except ImportError:
        path = ctypes.util.find_library("openblas")
        if path:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        return path or "reference BLAS (ratios flatter the native side)"
    library = Path(blas.get_lib_dir()) / blas.get_library(fullname=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    if blas.get_library() == "openblas":
        return str(library)
    source = "".join(
        f'__asm__(".globl {name}\\n{name}: jmp scipy_{name}@PLT");\n'
        for name in ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
    )
    folder = Path(tempfile.mkdtemp())
    (folder / "shim.c").write_text(source)
    shim = folder / "shim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, folder / "shim.c", library], check=True)
    ctypes.CDLL(str(shim), mode=ctypes.RTLD_GLOBAL)
    return library.name


def shaped(mlx_model: ModuleType, **sizes: Any) -> Any:
    """A random model, evaluated."""
    import mlx.core as mx
    from mlx.utils import tree_map

    mx.random.seed(0)
    model = mlx_model.Model(mlx_model.ModelArgs(rms_norm_eps=1e-5, **sizes))
    # numbers that bf16 holds, as those of published checkpoints are
    model.update(tree_map(lambda value: value.astype(mx.bfloat16).astype(mx.float32), model.parameters()))
    mx.eval(model.parameters())
    return model


def smollm(gguf_path: Path | None) -> tuple[Any, dict[str, Any]]:
    """SmolLM2-135M as dense fp32 with its file's own blocks; random weights in the same blocks without the file."""
    import mlx.core as mx
    from mlx_lm.models import llama

    from specl.shared import native

    sizes = {"hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536, "num_attention_heads": 9}
    sizes |= {"num_key_value_heads": 3, "vocab_size": 49152, "rope_theta": 100000.0, "model_type": "llama"}
    model, exact, weights = shaped(llama, **sizes), {}, []
    if gguf_path is None:
        from specl.shared.native import modules, packing

        def quantise(path: str, module: Any) -> None:
            bits = 8 if path.endswith("embed_tokens") else 4
            parts = mx.quantize(module.weight.astype(mx.float16), 32, bits)
            exact[path] = packing.affine_from_mlx(*parts, bits=bits, group_size=32)
            weights.append((f"{path}.weight", packing.pack_affine(exact[path]).unpack()))

        modules.each_layer(model, True, quantise)
    else:
        import gguf

        names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
        names |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
        names |= {"ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
        whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
        for tensor in gguf.GGUFReader(gguf_path).tensors:
            part = tensor.name.split(".")
            path = whole.get(part[0]) or f"model.layers.{part[1]}.{names[part[2]]}"
            dense = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            kept = native.affine_from_gguf(tensor.data, tensor.tensor_type.name) if dense.ndim == 2 else None
            if part[-2] in ("attn_q", "attn_k"):  # llama.cpp interleaves the halves of a rotation
                rows = dense.shape[0]
                order = np.arange(rows).reshape(rows // 64, 32, 2).swapaxes(1, 2).reshape(rows)
                dense, kept = dense[order], kept.rows(order)
            weights.append((f"{path}.weight", mx.array(dense)))
            if kept is not None:
                exact[path] = kept
    model.load_weights(weights, strict=gguf_path is not None)
    mx.eval(model.parameters())
    return model, exact


class Runner:
    """Decode steps of a model at a fixed text length."""

    def __init__(self, model: Any, context: int) -> None:
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache

        self._mx, self._model = mx, model
        self._cache = make_prompt_cache(model)
        mx.eval(model(mx.array([[1 + i % 97 for i in range(context)]]), cache=self._cache))

    def step(self, width: int) -> float:
        """Milliseconds of one step, rewound."""
        ids = self._mx.array([[3 + i for i in range(width)]])
        start = time.perf_counter()
        self._mx.eval(self._model(ids, cache=self._cache))
        took = time.perf_counter() - start
        for entry in self._cache:
            entry.trim(width)
        return took * 1e3


def by_turns(sides: dict[str, Callable[[], float]], rounds: int, burst: int = 3) -> dict[str, float]:
    """Each side's median; a burst of each in turn, so that a busy moment of the machine hits all."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            side()  # what the side before left in the caches is not this one's
            times[name] += [side() for _ in range(burst)]
    return {name: statistics.median(values) for name, values in times.items()}


def greedy(model: Any, prompt: list[int], n: int) -> list[int]:
    """A greedy continuation."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    cache, out, ids = make_prompt_cache(model), [], prompt
    for _ in range(n):
        out.append(int(mx.argmax(model(mx.array([ids]), cache=cache)[0, -1]).item()))
        ids = out[-1:]
    return out


def llama_cpp(path: Path, threads: int) -> Callable[[], float] | None:
    """Milliseconds of one plain step of llama.cpp, or nothing where it is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    import llama_cpp

    model = llama_cpp.Llama(str(path), n_threads=threads, n_ctx=512, verbose=False, logits_all=False)
    model.eval(list(range(1, 65)))

    def step() -> float:
        start = time.perf_counter()
        model.eval([5])
        took = time.perf_counter() - start
        model.n_tokens -= 1
        return took * 1e3

    return step


def compare(name: str, make: Callable[[], tuple[Any, dict[str, Any]]], rounds: int, extra: dict[str, Any]) -> None:
    """One model's lines."""
    from specl.shared import native

    (plain, _), (fast, exact) = make(), make()
    got = native.accelerate(fast, exact=exact)
    print(f"{name}: {got.formats}, fused {got.fused} {got.reason}")
    ordinary, runner = Runner(plain, 64), Runner(fast, 64)
    sides = {f"native {w}": (lambda w=w: runner.step(w)) for w in (1, 4, 8, 16)}
    took = by_turns(
        {"mlx-lm": lambda: ordinary.step(1), "mlx-lm 8": lambda: ordinary.step(8), **sides, **extra}, rounds
    )
    print("  ms a step: " + ", ".join(f"{k} {v:.2f}" for k, v in took.items()))
    print(f"  plain decoding against mlx-lm: {took['mlx-lm'] / took['native 1']:.2f}x")
    print(f"  width 8 against mlx-lm:        {took['mlx-lm 8'] / took['native 8']:.2f}x")
    for width in (4, 8, 16):
        print(f"  width {width} against width 1: {took[f'native {width}'] / took['native 1']:.2f}")
    if "llama.cpp" in took:
        print(f"  plain decoding against llama.cpp: {took['llama.cpp'] / took['native 1']:.2f}x")
    prompt = [1, 4093, 198, 57, 1265, 314]
    print(f"  greedy text equal over 64 tokens: {greedy(fast, prompt, 64) == greedy(plain, prompt, 64)}")


def main() -> None:
    """All figures."""
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--gguf", type=Path)
    ask.add_argument("--rounds", type=int, default=15)
    given = ask.parse_args()
    blas = bind_openblas()
    from mlx_lm.models import qwen2

    from specl.shared import native

    if not native.available():
        sys.exit(f"no native kernels: {native.reason()}")
    print(f"{native.instruction_set()}, {native.threads()} threads, BLAS of the ordinary path: {blas}")
    threads = len(os.sched_getaffinity(0))
    other = llama_cpp(given.gguf, threads) if given.gguf else None
    compare("SmolLM2-135M", lambda: smollm(given.gguf), given.rounds, {"llama.cpp": other} if other else {})
    sizes = {"hidden_size": 896, "num_hidden_layers": 24, "intermediate_size": 4864, "num_attention_heads": 14}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 8192, "model_type": "qwen2"}
    compare("random Qwen2, 24 layers of 896", lambda: (shaped(qwen2, **sizes), {}), given.rounds, {})


if __name__ == "__main__":
    main()

"""The `head` draft: a one-layer head bound to its target, with the hot vocabulary that it scores;
made, saved, loaded.

Hot vocabulary (FR-Spec, arXiv 2502.14856): only the output rows of the `hot` tokens are scored, an
exact subset, so that all other tokens have draft probability 0. Embedding and output rows belong to
the target and are shared, never stored, never trained. Does not know caches of requests, sampling,
acceptance. The network itself is in head_layer.py.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from specl.shared.errors import ModelError, model_error
from specl.shared.models.cpu_kernels import FEW_ROWS, draft_stack, on_cpu, use_cpu_kernels, use_cpu_kernels_in_layer
from specl.shared.models.head_layer import Head, HeadShape
from specl.shared.models.language_model import DENSE_ROWS, LanguageModel
from specl.shared.models.tensors import flat_parameters, read_tensors
from specl.shared.native.drafting import DraftStack
from specl.shared.runtime.atomic_files import atomic_dir
from specl.shared.runtime.incremental import Steps, run_all

MODEL_TYPE = "speclora_head"
MAX_SIZE = 2**31  # of any number in a head's config


@dataclass(slots=True)
class HeadDraft:
    """A head bound to its target: what the model drafter runs. `hot` [h] are token ids, sorted.

    `output` scores them with the target's own rows; it belongs to no module that an adapter could
    touch.
    """

    name: str
    path: Path | None
    head: Head
    shape: HeadShape
    target: LanguageModel
    hot: np.ndarray
    fingerprint: str
    dtype: mx.Dtype = mx.float32
    output: nn.Linear = field(init=False)
    native_step: DraftStack | None = field(init=False, default=None)  # the head as one native call, where possible

    def __post_init__(self) -> None:
        self.hot, self.output = run_all(self._scorer_steps(self.hot))

    def set_hot(self, hot: np.ndarray) -> None:
        """Score another hot vocabulary. Raises ModelError unless it has the draft's size and valid,
        distinct tokens.
        """
        self.hot, self.output = run_all(self.scorer_steps(hot))

    def scorer_steps(self, hot: np.ndarray) -> Steps[tuple[np.ndarray, nn.Linear]]:
        """`hot` sorted, and the layer that scores it. Nothing in use is touched: the caller assigns
        both to `hot` and `output`. Raises ModelError as `set_hot`.
        """
        size = self.target.vocabulary_size
        hot = np.unique(np.asarray(hot, dtype=np.int64))
        if len(hot) != self.shape.hot_size or hot[0] < 0 or hot[-1] >= size:
            raise ModelError(f"a hot vocabulary needs {self.shape.hot_size} distinct tokens below {size}")
        return (yield from self._scorer_steps(hot))

    def _scorer_steps(self, hot: np.ndarray) -> Steps[tuple[np.ndarray, nn.Linear]]:
        output = nn.Linear(self.shape.hidden_size, 1, bias=False)
        output.weight = self.target.output_rows(mx.array(hot)).astype(self.dtype)
        mx.eval(output.weight)
        yield
        if on_cpu():
            blocks = self.target.output_blocks(hot)
            yield
            use_cpu_kernels_in_layer(output, blocks, "exact" if self.target.output_is_blocks else "auto")
        return hot, output

    def use_cpu_kernels_in_layer(self, layer: nn.Module) -> None:
        """`use_cpu_kernels` for one layer that is to replace one of the head's."""
        if on_cpu():
            use_cpu_kernels_in_layer(layer, weights="bf16")

    def use_cpu_kernels(self) -> None:
        """Compute few rows natively where that is possible; call again after layers changed."""
        if on_cpu():
            use_cpu_kernels(self.head, fuse=False, weights="bf16")
            self.native_step = draft_stack(self.head, self.target.embedding.weight)

    @property
    def prefill_rows(self) -> int:
        """The rows of a step with which a long text is fed fastest."""
        return FEW_ROWS if self.native_step is not None else DENSE_ROWS

    def step(self, states: mx.array, ids: list[int], cache: Any) -> tuple[mx.array, np.ndarray, int, float]:
        """Feed `ids` [n] with `states` [n, hidden] after `cache`: the last output [1, hidden], its
        scores [hot] of the hot tokens, the index of the best score, and their log-sum-exp.
        """
        if self.native_step is not None and len(ids) <= FEW_ROWS:
            result = self.native_step.step(states, ids, cache, self.output)
            if result is not None:
                output, hot_scores, best, total = result
                return output, np.array(hot_scores, copy=False), best, total
        output = self.head(states[None], self.target.embed(mx.array([ids])), cache)[0, -1:]
        scores = np.array(self.logits(output[0]).astype(mx.float32), copy=False)
        best = int(scores.argmax())
        return output, scores, best, float(scores[best] + np.log(np.exp(scores - scores[best]).sum()))

    def logits(self, outputs: mx.array) -> mx.array:
        """Scores of the hot tokens [..., hot] for outputs [..., hidden]."""
        scores: mx.array = self.output(outputs)
        return scores


def head_shape(target: LanguageModel, hot_size: int) -> HeadShape:
    """The shape of a one-layer head for `target`: the sizes of one of its layers."""
    c = target.config
    heads = int(c["num_attention_heads"])
    return HeadShape(
        hidden_size=target.hidden_size,
        intermediate_size=int(c["intermediate_size"]),
        num_attention_heads=heads,
        num_key_value_heads=int(c.get("num_key_value_heads") or heads),
        head_dim=int(c.get("head_dim") or target.hidden_size // heads),
        rope_theta=float(c.get("rope_theta") or 10000.0),
        rms_norm_eps=float(c["rms_norm_eps"]),
        hot_size=hot_size,
        target_name=target.name,
        target_fingerprint=target.fingerprint,
        tokenizer_fingerprint=target.tokenizer_fingerprint,
    )


def new_head(target: LanguageModel, hot: np.ndarray, name: str = "new") -> HeadDraft:
    """An untrained head for `target`. Norms start at one; the rest as MLX initialises linear
    layers.
    """
    hot = np.unique(np.asarray(hot, dtype=np.int64))
    shape = head_shape(target, len(hot))
    head = Head(shape)
    mx.eval(head.parameters())
    return HeadDraft(name, None, head, shape, target, hot, "")


def save_head(
    draft: HeadDraft, folder: Path, manifest: dict[str, Any], add_files: Callable[[Path], None] = lambda folder: None
) -> None:
    """Write a draft directory (bf16 weights, hot vocabulary, config, manifest) whole, by rename.

    `add_files` may write more files into the directory before the rename. Weights are bf16, which
    the native kernels read as it is: half the memory traffic of fp32 a draft step.
    """
    weights = {name: value.astype(mx.bfloat16) for name, value in flat_parameters(draft.head.parameters()).items()}
    with atomic_dir(folder, sync=True) as scratch:
        mx.save_safetensors(str(scratch / "model.safetensors"), weights, metadata={"format": "mlx"})
        np.save(scratch / "hot_vocab.npy", draft.hot.astype(np.uint32))
        (scratch / "config.json").write_text(json.dumps({"model_type": MODEL_TYPE, **asdict(draft.shape)}, indent=2))
        (scratch / "manifest.json").write_text(json.dumps(manifest, indent=2))
        add_files(scratch)


def is_head(folder: Path) -> bool:
    """Whether `folder` holds a head draft."""
    try:
        return bool(json.loads((folder / "config.json").read_text())["model_type"] == MODEL_TYPE)
    except (OSError, ValueError, KeyError):
        return False


def _read_shape(path: Path) -> HeadShape:
    """The shape in a head's config.json. Raises OSError, or ValueError that names the wrong field."""
    config = json.loads(path.read_text())
    if not isinstance(config, dict):
        raise ValueError(f"{path.name} holds no object")
    config.pop("model_type", None)
    types = {field.name: field.type for field in fields(HeadShape)}
    if unknown := sorted(config.keys() ^ types.keys()):
        raise ValueError(f"{path.name}: {', '.join(unknown)} is missing or unknown")
    for name, kind in types.items():
        value = config[name]
        if kind is str:
            fits = isinstance(value, str)
        else:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            fits = number and 0 < value < MAX_SIZE and (kind is float or isinstance(value, int))
        if not fits:
            raise ValueError(f"{path.name}: {name} is {value!r:.60}")
    return HeadShape(**config)


def hot_vocabulary_problems(hot: np.ndarray, size: int, vocabulary: int) -> list[str]:
    """Everything that keeps `hot` from being `size` distinct tokens of a vocabulary. Empty means
    usable.
    """
    if not isinstance(hot, np.ndarray) or hot.ndim != 1 or not np.issubdtype(hot.dtype, np.integer):
        kind = f"{hot.dtype} of shape {hot.shape}" if isinstance(hot, np.ndarray) else "an archive"
        return [f"its hot vocabulary is {kind}, not a list of token ids"]
    problems = []
    if len(hot) != size:
        problems.append(f"its hot vocabulary has {len(hot)} tokens; the draft scores {size}")
    if len(np.unique(hot)) != len(hot):
        problems.append("its hot vocabulary names a token twice")
    if len(hot) and not 0 <= int(hot.min()) <= int(hot.max()) < vocabulary:
        problems.append(f"its hot vocabulary goes from {hot.min()} to {hot.max()}; tokens are 0 to {vocabulary - 1}")
    return problems


def load_head(folder: Path, name: str, target: LanguageModel) -> HeadDraft:
    """Load and bind a head. Raises ModelError where it is damaged or was made for another target."""
    hint = "build it again with `specl-ctl draft build`"
    try:
        shape = _read_shape(folder / "config.json")
        # mapped: a header that claims more than the file holds fails before memory is allocated
        hot = np.load(folder / "hot_vocab.npy", mmap_mode="r", allow_pickle=False)
        weights = read_tensors(folder / "model.safetensors")
    except MemoryError:
        raise
    except Exception as error:  # the readers of these files raise many kinds for damaged ones
        raise model_error(f"the draft {name} is damaged: {error or type(error).__name__}", hint, error) from error
    if (shape.target_fingerprint, shape.tokenizer_fingerprint) != (target.fingerprint, target.tokenizer_fingerprint):
        raise ModelError(
            f"the draft {name} was made for {shape.target_name} ({shape.target_fingerprint}), not for {target.name} ({target.fingerprint})",
            "make one for this target with `specl-ctl draft build`, or set models.draft.name to null",
        )
    if problems := hot_vocabulary_problems(hot, shape.hot_size, target.vocabulary_size):
        raise ModelError(f"the draft {name} is damaged: {'; '.join(problems)}", hint)
    hot = np.array(hot).astype(np.int64)
    dtype = target.embed(mx.array([0])).dtype
    try:
        head = Head(shape)
        head.load_weights([(key, value.astype(dtype)) for key, value in weights.items()])
        mx.eval(head.parameters())
    except (ValueError, TypeError, RuntimeError, OverflowError, ZeroDivisionError) as error:
        raise ModelError(f"the draft {name} is damaged: {str(error).splitlines()[0]}", hint) from error
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]
    draft = HeadDraft(name, folder, head, shape, target, hot, digest, dtype)
    draft.use_cpu_kernels()
    return draft

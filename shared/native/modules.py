"""Subclasses of MLX's layers that keep their dense weight and compute a few rows from a packed copy
of it.

A layer changes its class and nothing else, so names, parameters, isinstance and LoRA wrapping work
as before, and giving the class back undoes it. Does not know models. Promises: a weight that was
exchanged since packing, input of a gradient or of a compilation, and more rows than MAX_WIDTH take
MLX's own product.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from specl.shared.native.extension import MAX_WIDTH, native
from specl.shared.native.packing import Affine, Matrix, Weights, affine_from_mlx, can_pack, pack, pack_affine


class PackedWeight:
    """A packed weight and the array it was made from, which it keeps, so that no other array can
    take its identity.
    """

    __slots__ = ("_id", "_source", "matrix")

    def __init__(self, matrix: Matrix, source: mx.array) -> None:
        self.matrix = matrix
        self._source = source
        self._id: int = native().array_id(source)

    def of(self, weight: mx.array) -> bool:
        """Whether this is still the packed form of `weight`."""
        return bool(native().array_id(weight) == self._id)

    def __deepcopy__(self, memo: dict[int, object]) -> "PackedWeight":
        return self  # never written to


class FewRowLinear(nn.Linear):
    """A linear layer with a packed copy of its weight."""

    packed: PackedWeight

    def __call__(self, x: mx.array) -> mx.array:
        """The packed product for a few rows, else the dense one."""
        if _few(x) and self.packed.of(self.weight):
            return _product(x, self.packed, self.get("bias"))
        return super().__call__(x)


class FewRowQuantizedLinear(nn.QuantizedLinear):
    """A quantised layer with its weight in the kernels' layout; for any number of rows, as MLX's
    product is scalar.
    """

    packed: PackedWeight

    def __call__(self, x: mx.array) -> mx.array:
        """The packed product."""
        if x.dtype == mx.float32 and not native().is_tracer(x) and self.packed.of(self.weight):
            return _product(x, self.packed, self.get("bias"))
        quantised: mx.array = super().__call__(x)
        return quantised


class FewRowEmbedding(nn.Embedding):
    """An embedding whose table is also the output matrix."""

    packed: PackedWeight

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits: the packed product for a few rows, else the dense one."""
        if _few(x) and self.packed.of(self.weight):
            return _product(x, self.packed)
        dense: mx.array = super().as_linear(x)
        return dense


FEW_ROW_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FewRowLinear,
    nn.QuantizedLinear: FewRowQuantizedLinear,
    nn.Embedding: FewRowEmbedding,
}
PLAIN_CLASSES: dict[type[nn.Module], type[nn.Module]] = {fast: plain for plain, fast in FEW_ROW_CLASSES.items()}


def _few(x: mx.array) -> bool:
    return x.dtype == mx.float32 and 0 < x.size <= MAX_WIDTH * x.shape[-1] and not native().is_tracer(x)


def _product(x: mx.array, packed: PackedWeight, bias: mx.array | None = None) -> mx.array:
    y: mx.array = native().linear(x, packed.matrix, bias)
    return y


def packed_weight(module: nn.Module) -> PackedWeight | None:
    """The packed copy that a layer computes few rows from; None where it has none."""
    return module.packed if isinstance(module, (FewRowLinear, FewRowQuantizedLinear, FewRowEmbedding)) else None


def packed_matrix(module: nn.Module) -> Matrix:
    """The packed copy of a layer that has one. Raises ValueError for any other."""
    packed = packed_weight(module)
    if packed is None:
        raise ValueError(f"a {type(module).__name__} has no packed weight")
    return packed.matrix


def attach(module: nn.Module, weights: Weights, exact: Affine | None) -> Matrix | None:
    """Pack a plain layer's weight and give it the few-row class; None where it is of another kind
    or type.
    """
    kind = FEW_ROW_CLASSES.get(type(module)) or (type(module) if type(module) in PLAIN_CLASSES else None)
    if kind is None or ("bias" in module and module.bias.dtype != mx.float32):
        return None
    if kind is FewRowQuantizedLinear:
        if module.mode != "affine" or not can_pack(module.bits, module.group_size):
            return None
        parts = module.weight, module.scales, module.biases
        matrix = pack_affine(affine_from_mlx(*parts, bits=module.bits, group_size=module.group_size))
    elif module.weight.dtype != mx.float32:
        return None
    else:
        mx.eval(module.weight)
        matrix = pack(module.weight, weights, exact)
    module.packed = PackedWeight(matrix, module.weight)
    module.__class__ = kind
    return matrix


def detach(module: nn.Module) -> None:
    """Give a layer its plain class back."""
    if type(module) in PLAIN_CLASSES:
        module.__class__ = PLAIN_CLASSES[type(module)]
        del module.packed


def each_layer(model: nn.Module, tied: bool, visit: Callable[[str, nn.Module], None]) -> None:
    """Visit every layer that can have a few-row class; the embedding only where it is the output
    matrix as well.
    """
    for path, module in model.named_modules():
        kind = PLAIN_CLASSES.get(type(module), type(module))
        if kind in FEW_ROW_CLASSES and (kind is not nn.Embedding or (tied and path.endswith("embed_tokens"))):
            visit(path, module)

"""The layers' faces: modules that keep their dense weights and answer a few rows from the packed ones.

An instance changes its class and nothing else, so names, parameters, isinstance and LoRA wrapping work as before, and
taking the class back undoes it. Does not know models. Promises: weights that were exchanged since packing, inputs of a
gradient or of a compilation, and more rows than MAX_WIDTH go to the ordinary product.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from specl.shared.native.extension import MAX_WIDTH, native
from specl.shared.native.packing import Affine, Matrix, Weights, affine_from_mlx, can_pack, pack, pack_affine


class Packed:
    """A packed weight and the array it was made from, which it keeps, so that no other array can take its identity."""

    __slots__ = ("_id", "_source", "matrix")

    def __init__(self, matrix: Matrix, source: mx.array) -> None:
        self.matrix = matrix
        self._source = source
        self._id = native().array_id(source)

    def of(self, weight: mx.array) -> bool:
        """Whether this is still the packed form of `weight`."""
        return native().array_id(weight) == self._id

    def __deepcopy__(self, memo: dict) -> "Packed":
        return self  # never written to


class FewRowLinear(nn.Linear):
    """A linear layer with a packed copy of its weight."""

    def __call__(self, x: mx.array) -> mx.array:
        """The packed product for a few rows, else the dense one."""
        if _few(x) and self._packed.of(self.weight):
            return native().linear(x, self._packed.matrix, self.get("bias"))
        return super().__call__(x)


class FewRowQuantizedLinear(nn.QuantizedLinear):
    """A quantised layer with its weight in the kernels' layout; for any number of rows, as MLX's product is scalar."""

    def __call__(self, x: mx.array) -> mx.array:
        """The packed product."""
        if x.dtype == mx.float32 and not native().is_tracer(x) and self._packed.of(self.weight):
            return native().linear(x, self._packed.matrix, self.get("bias"))
        return super().__call__(x)


class FewRowEmbedding(nn.Embedding):
    """An embedding whose table is also the output head."""

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits: the packed product for a few rows, else the dense one."""
        if _few(x) and self._packed.of(self.weight):
            return native().linear(x, self._packed.matrix)
        return super().as_linear(x)


FACES: dict[type, type] = {
    nn.Linear: FewRowLinear,
    nn.QuantizedLinear: FewRowQuantizedLinear,
    nn.Embedding: FewRowEmbedding,
}
DENSE: dict[type, type] = {face: plain for plain, face in FACES.items()}


def _few(x: mx.array) -> bool:
    return x.dtype == mx.float32 and 0 < x.size <= MAX_WIDTH * x.shape[-1] and not native().is_tracer(x)


def attach(module: nn.Module, weights: Weights, exact: Affine | None) -> Matrix | None:
    """Pack a plain layer's weight and give it the fast face; None where it is of another kind or type."""
    face = FACES.get(type(module)) or (type(module) if type(module) in DENSE else None)
    if face is None or ("bias" in module and module.bias.dtype != mx.float32):
        return None
    if face is FewRowQuantizedLinear:
        if module.mode != "affine" or not can_pack(module.bits, module.group_size):
            return None
        parts = module.weight, module.scales, module.biases
        packed = pack_affine(affine_from_mlx(*parts, bits=module.bits, group_size=module.group_size))
    elif module.weight.dtype != mx.float32:
        return None
    else:
        mx.eval(module.weight)
        packed = pack(module.weight, weights, exact)
    module._packed = Packed(packed, module.weight)
    module.__class__ = face
    return packed


def detach(module: nn.Module) -> None:
    """Back to the plain layer."""
    if type(module) in DENSE:
        module.__class__ = DENSE[type(module)]
        del module._packed


def each_layer(model: nn.Module, tied: bool, visit: Callable[[str, nn.Module], None]) -> None:
    """Every layer that can take a fast face; the embedding only where it is the head as well."""
    for path, module in model.named_modules():
        kind = DENSE.get(type(module), type(module))
        if kind in FACES and (kind is not nn.Embedding or (tied and path.endswith("embed_tokens"))):
            visit(path, module)

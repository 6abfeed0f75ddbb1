"""LoRA's steps run at once on a module, for tests that have no engine."""

from mlx.utils import tree_unflatten

from specl.shared.models.lora import change_norm_steps, check_steps, detach, fuse_steps, linear_layers
from specl.shared.runtime.incremental import run_all


def fuse(module, shape, weights):
    """Make `module` compute with the adapter; `fused` or `unfused`."""
    detach(module)
    form, layers = run_all(fuse_steps(linear_layers(module), shape, weights))
    module.update_modules(tree_unflatten(list(layers.items())))
    return form


def problems(module, shape, weights):
    return run_all(check_steps(module, shape, weights))


def change_norm(shape, weights):
    return run_all(change_norm_steps(shape, weights))

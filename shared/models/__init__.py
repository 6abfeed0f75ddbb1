"""Models: from a name to a folder (find), from a folder to weights (load), the drafts (head,
layers), LoRA on modules.

Importing this package binds a fast BLAS before MLX loads: the only import with an effect;
`blas.BOUND` says which one.
"""

from specl.shared.models import blas as blas

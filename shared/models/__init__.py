"""Names to weights: resolve, fetch, convert, load; tokenizers; adapters on modules. Binds a fast BLAS before MLX loads:
importing this package is the one thing in the house that does something, and `specl.shared.models.blas.BOUND` says what.
"""

from specl.shared.models import blas as blas

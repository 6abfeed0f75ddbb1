"""How a draft learns: losses, examples, the step loop, evaluation. The trainer, `draft build` and
`eval` all use it.

Arrays and models in, arrays out. Touches no disk, no environment and no settings: what it needs is
handed in.
"""

from specl.shared.models import blas as blas  # binds the BLAS before any module here imports mlx

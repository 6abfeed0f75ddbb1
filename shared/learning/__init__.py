"""How a draft learns, pure: losses, examples, the step loop, evaluation. The trainer, `draft build` and `eval` all run this one."""

from specl.shared.models import blas as blas  # binds the BLAS before any module here imports mlx

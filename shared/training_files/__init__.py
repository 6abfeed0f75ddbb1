"""What training keeps on disk: shards of examples, texts of the target as token ids, checkpoints,
and the folder of `draft build`.

Knows files and what is in them. How a draft learns is `learning`'s; which settings and folders
apply is for callers to say.
"""

from specl.shared.models import blas as blas  # binds the BLAS before any module here imports mlx

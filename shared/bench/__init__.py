"""What `specl-ctl bench` measures with: prompts, arms, texts, ratios. Runs the engine and its
rivals in turn; prints nothing.
"""

from specl.shared.models import blas as blas  # binds the BLAS before any module here imports mlx

"""The speculative decoding engine, pure: no sockets, no database, no command line. Everything that runs models runs this one."""

from specl.shared.models import blas as blas  # binds the BLAS before any module here imports mlx

"""The speculative decoding engine. Pure: no sockets, database, files, settings or command line.

Everything that runs models runs this one: the daemons, the benches and the Python API.
"""

from specl.shared.models import blas as blas  # binds the BLAS before any module here imports mlx

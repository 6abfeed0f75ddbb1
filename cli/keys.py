"""`specl-ctl keys`: CURVE keys, with which daemons accept clients on other machines and refuse
everybody else.
"""

import click

from specl.shared.errors import SpecLoraError
from specl.shared.messaging.endpoints import read_keys, write_keys
from specl.shared.paths import find_paths


@click.group()
def keys() -> None:
    """Keys for clients on other machines."""


@keys.command()
@click.option("--force", is_flag=True, help="Replace existing keys; clients with the old ones are refused.")
def make(force: bool) -> None:
    """Make keys for this run directory (0600). Every socket requires them once the daemons are
    restarted.
    """
    from specl.shared.messaging.sockets import new_keys

    paths = find_paths().create()
    if not force and read_keys(paths.keys) is not None:
        raise SpecLoraError(f"there are keys in {paths.keys} already", "--force replaces them")
    try:
        write_keys(paths.keys, new_keys())
    except OSError as error:
        raise SpecLoraError(f"the keys could not be written: {error}") from error
    click.echo(f"made {paths.keys}; restart the daemons")
    click.echo(
        f"a client elsewhere needs {paths.keys / 'client.json'} in its own keys folder, and the same `bus` settings"
    )

"""Imported as `specl.cli`; the guard stops a second copy from the repository root (isinstance would
then fail).
"""

if __name__ != "specl.cli":
    raise ImportError("import specl.cli, not cli (run `pip install -e .` first)")

"""Imported as `specl.daemons`; the guard stops a second copy from the repository root (isinstance would then fail)."""

if __name__ != "specl.daemons":
    raise ImportError("import specl.daemons, not daemons (run `pip install -e .` first)")

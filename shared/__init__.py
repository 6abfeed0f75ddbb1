"""Imported as `specl.shared`; the guard stops a second copy from the repository root (isinstance would then fail)."""

if __name__ != "specl.shared":
    raise ImportError("import specl.shared, not shared (run `pip install -e .` first)")

"""The shipped settings files."""

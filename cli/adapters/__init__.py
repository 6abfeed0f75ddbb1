"""`specl-ctl adapters`."""

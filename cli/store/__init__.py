"""`specl-ctl store`: look, export, import, purge."""

"""`specl-ctl chat`."""

"""`specl-ctl draft build`."""

"""`specl-ctl bench`, `bench learning` and `demo`."""

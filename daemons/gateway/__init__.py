"""HTTP in front of the bus: an OpenAI-compatible API and a page. Off the critical path: the others never need it."""

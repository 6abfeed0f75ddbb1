"""Files that people hand in: prompts and plain text."""

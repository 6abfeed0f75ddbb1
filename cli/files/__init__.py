"""Files that users hand to commands: text, and prompts in text, JSON or CSV."""

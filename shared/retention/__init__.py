"""What is kept of a user's text, and how it is forgotten: redaction, purge,
hidden states, checkpoints.
"""

"""The inference daemon: a queue, one MLX thread that runs the engine, and the delivery of what it
learned.
"""

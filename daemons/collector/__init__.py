"""The collector: fetches what producers have accepted and commits it to the store. The
store's only writer.
"""

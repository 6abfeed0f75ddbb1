"""Adapter directories: written whole or not at all, verified, listed, loaded as tensors."""

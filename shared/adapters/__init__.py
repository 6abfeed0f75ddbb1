"""Adapter directories: published by rename, verified, listed, loaded as tensors."""

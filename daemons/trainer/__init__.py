"""The trainer: turns stored disagreements into adapters, keeps one only if it helps, and says so.
Polite to inference.
"""

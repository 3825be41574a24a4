"""Verbs of `vq`."""

"""Verbs of `ckpt`, one file each."""

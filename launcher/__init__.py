"""Starts runs of `pretrain` on machines: one file per backend, a pure plan, a thin submit.

Nothing here imports `pretrain`: a login node needs no torch to plan a run.
"""

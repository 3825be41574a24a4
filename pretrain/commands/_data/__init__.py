"""The verbs of `python -m pretrain data`."""

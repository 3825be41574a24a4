"""Feature extractors: a plug-in folder, see base.py."""

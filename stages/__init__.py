"""The stages of train.py: each composes the packages, and leaves its part in a run folder."""

"""Presets for train.py (YAML), and what they can say (`settings`)."""

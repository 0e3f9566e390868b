"""Preferences: a decoder learns to write what is preferred, without a reward model in between."""

"""Extractive question answering: an answer is a part of its context, or there is none."""

"""Pretraining on packed text: what all of its objectives share."""

"""Supervised tuning of decoders on prompts and answers, chats, and pairs of texts."""

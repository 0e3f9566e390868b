"""A class, and the few words that it was read off."""

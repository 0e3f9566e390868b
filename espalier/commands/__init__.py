"""Commands that cross the doors (demo, report)."""

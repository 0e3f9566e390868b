"""What can be fine-tuned: a package a task. Its record.py says what it is and imports nothing heavy."""

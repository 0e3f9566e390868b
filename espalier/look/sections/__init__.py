"""The parts of the page of `look`, a file each."""

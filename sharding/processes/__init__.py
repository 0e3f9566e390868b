"""The processes of one run: which there are, how they wait for each other, and how the end of one ends all."""

"""Classes by named concepts: what is said of a text, and a linear layer from that to its class."""

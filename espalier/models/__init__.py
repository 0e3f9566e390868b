"""The transformer, its parts and its families. Only this package knows that it is Flax Linen."""

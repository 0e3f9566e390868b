"""How much data and compute a model takes, by published scaling laws."""

"""GLUE (Wang et al. 2019): nine tasks from one checkpoint, by the protocols that people publish."""

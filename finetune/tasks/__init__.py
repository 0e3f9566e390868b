"""One file a task kind; a task turns labelled rows into a loss and metrics."""

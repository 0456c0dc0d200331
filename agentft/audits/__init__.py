"""Look at a dataset before training on it."""

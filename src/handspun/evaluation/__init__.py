"""How good a model is on rows that it did not learn: losses and answers."""

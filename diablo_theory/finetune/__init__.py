"""Training and evaluating language models with every method, one run at a time."""

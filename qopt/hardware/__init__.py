"""Cost models and targets: what a format costs where it runs."""

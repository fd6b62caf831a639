"""Q-Former: a few queries that attend to the tokens of an image."""

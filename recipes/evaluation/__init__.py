"""Whether a model answers as its test rows ask."""

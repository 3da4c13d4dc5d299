"""The front door: a model in, masks on it out."""

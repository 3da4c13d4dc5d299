"""How operators move channels, and the graph of channels that comes of it."""

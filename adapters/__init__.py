"""Channel graphs written by hand, to check the automatic ones against; fxlean never reads them."""

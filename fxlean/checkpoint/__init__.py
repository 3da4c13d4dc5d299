"""Pruned and compacted networks in files, without pickle."""

"""Models without layer modules: a graph of small layers, written from an exported one."""

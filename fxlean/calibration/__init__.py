"""What unlabelled batches say of a network: how variance is shared, and how to repair it."""

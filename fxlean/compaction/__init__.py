"""A pruned model as an ordinary, smaller and faster one."""

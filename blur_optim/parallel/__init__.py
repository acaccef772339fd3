"""Many processes: what is summed over ranks, and what wrappers keep back from ``p.grad``."""

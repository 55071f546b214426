"""The cache check: writers, readers through caches, and faults; no read staler than promised."""

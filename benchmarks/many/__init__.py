"""Many adapters at once: routing, training side by side, banks, loading, attention under vmap."""

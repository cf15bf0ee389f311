"""What the systems achieve on real images: one command a table, into ``benchmarks/results/accuracy``."""

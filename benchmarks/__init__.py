"""jalign beside its peers, on the same rows: `make bench`, see docs/performance.md."""

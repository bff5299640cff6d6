"""What `benchmarks.robustness` does to a training: kills it, spoils its files, compares its end."""

"""What `benchmarks.tune` tries, and what it measures it by."""

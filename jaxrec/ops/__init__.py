"""The core: pure functions over arrays. Needs JAX alone."""

"""What `seed_jax.evaluate` measures, a suite a file, and what the suites share."""

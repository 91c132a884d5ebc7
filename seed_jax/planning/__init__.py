"""What `seed_jax.plan` is made of: machines described to XLA, what a step costs, stand-ins."""

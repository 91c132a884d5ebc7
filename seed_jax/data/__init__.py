"""Pictures with captions: where they lie, their pixels, their tokens, and batches of them."""

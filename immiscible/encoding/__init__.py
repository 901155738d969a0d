"""A batch becomes what is diffused and what the network is told: pixels, latents, texts, and the cache of them."""

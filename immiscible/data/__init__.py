"""Where images and captions come from, how they become pixels, and in which order."""

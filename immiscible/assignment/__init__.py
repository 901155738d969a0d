"""The engine: which noise of a pool goes with which image, under conditions, over ranks and from a reservoir."""

"""Images to training batches: where they come from, how they become pixels, and in which order.

A run's data is a function, not a state: the global batch at a position is fixed by (seed, position), and the crop and the flip of
an image by (seed, epoch, index). So it is the same with any number of ranks and loader workers, and a resumed run begins in the
middle of an epoch without reading what came before.
"""

"""The stable matching of images and noises (Gale and Shapley), as a coupling of Multisample Flow Matching (arXiv 2304.14772, "Stable").

A matching is stable if no image and noise would both rather have each other than what they have. Here both rank by one cost,
``c[i, j]``, equal costs by the smaller i, then the smaller j: a strict order of all pairs. Then there is one stable matching:

- Take an image and a noise that are each other's first choice among those left; the least pair of all is one such. In a matching without
  this pair both would rather have each other, so every stable matching has it.
- What is left of a stable matching when the pair is taken out is a stable matching of what is left. So by induction the pairs follow,
  whatever the order in which mutual first choices are taken; from the least pair up it is the greedy matching of the sorted costs.

It is found by following first choices, image to noise to image, until two are mutual. Each step goes down in the order of pairs, so it
ends; and what stands before a pair that is taken out still holds, as nobody's other choices changed. Each image and noise joins the chain
once and N pairs leave it, so 3 N rows or columns are looked through: O(N^2) without sorting.
"""

from __future__ import annotations

import numba
import numpy


@numba.njit(cache=True, nogil=True)
def stable_matching(cost: numpy.ndarray, transposed: numpy.ndarray) -> numpy.ndarray:
    """The stable matching by one cost for both sides.

    Args:
        cost: fp32 [N, N], finite, of image i and noise j.
        transposed: the same, [j, i], contiguous too: noises look through rows of their own.

    Returns:
        int64 [N], a permutation: image i goes with noise ``index[i]``.
    """
    n = len(cost)
    index = numpy.full(n, -1, numpy.int64)
    taken = numpy.zeros(n, numpy.bool_)  # of noises
    chain = numpy.empty(2 * n + 1, numpy.int64)  # image, noise, image, ...
    for first in range(n):
        if index[first] >= 0:
            continue
        chain[0], length = first, 1
        while length > 0:
            last = chain[length - 1]
            choice, least = -1, numpy.float32(numpy.inf)
            if length % 2 == 1:
                for j in range(n):
                    if not taken[j] and cost[last, j] < least:
                        choice, least = j, cost[last, j]
            else:
                for i in range(n):
                    if index[i] < 0 and transposed[last, i] < least:
                        choice, least = i, transposed[last, i]
            if length > 1 and choice == chain[length - 2]:
                image, noise = (last, choice) if length % 2 == 1 else (choice, last)
                index[image], taken[noise] = noise, True
                length -= 2
            else:
                chain[length] = choice
                length += 1
    return index

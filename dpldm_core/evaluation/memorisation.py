"""Memorisation: are synthetic images nearer to training records than to held-out ones?

An alarm for mistakes, not a proof: the promise is in the privacy report. A release can hold to its epsilon and still be
drawn to the training set a little, and a copy of a record outside the drawn subset is only seen by the last count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import erfc
from sklearn.metrics import pairwise_distances_argmin_min


@dataclass(frozen=True)
class Memorisation:
    """Nearest real neighbours of synthetic images. Private: computed from real records.

    Args:
        num_images: Synthetic images looked at.
        num_records: Real records a side: random subsets of equal size.
        share_closer_to_training: Of the images, those whose nearest record is a training record; a tie counts half.
        reference_share: The same of training records outside the subset, which nothing can have memorised: what
            perfect images reach. 0.5 if both sets are of one source, and where too few records are left to measure it.
        standard_error: Of the difference of these two, if training and held-out records were one shuffled set.
        p_value: Two-sided, of that difference being 0.
        median_distance_to_training: L2 distance of images to their nearest training record, in pixels of [0, 1].
        median_distance_to_heldout: The same for held-out records.
        duplicates_of_training: Images that equal a training record of the subset in every pixel.
        duplicates_of_heldout: Images that equal a held-out record of the subset in every pixel.
        duplicates_of_any_training: All synthetic images that equal any training record in every pixel.
    """

    num_images: int
    num_records: int
    share_closer_to_training: float
    reference_share: float
    standard_error: float
    p_value: float
    median_distance_to_training: float
    median_distance_to_heldout: float
    duplicates_of_training: int
    duplicates_of_heldout: int
    duplicates_of_any_training: int


def measure_memorisation(
    images: np.ndarray, train_images: np.ndarray, heldout_images: np.ndarray, *, seed: int, max_images: int = 10_000
) -> Memorisation:
    """Compare the distances of synthetic images to training and to held-out records, in pixel space.

    Many images share a nearest record, so they are not independent and a binomial test would cry wolf. The standard
    error here is exact under a random split of the drawn records: record j is nearest to the share w_j of the images,
    and the share closer to training is the sum of w_j over half of the records, drawn without replacement
    (Cochran 1977, Sampling Techniques, Theorem 2.2). The p-value takes that sum as normal. The reference share absorbs
    that held-out records come from elsewhere (MNIST's test writers: 0.53), as far as the images are like the records.

    Args:
        images: Synthetic uint8 [n, h, w, c].
        train_images: Real training images, uint8 [m, h, w, c]. Private.
        heldout_images: Real held-out images, uint8 [k, h, w, c]. Private.
        seed: Of the subsets.
        max_images: Images a side at most.

    Returns:
        Shares, distances and counts. Private.
    """
    rng = np.random.default_rng(seed)
    num_records = min(len(train_images), len(heldout_images), max_images)
    rows, train, heldout = (_shuffled_rows(part, rng) for part in (images, train_images, heldout_images))
    train, rest, heldout = train[:num_records], train[num_records:][:max_images], heldout[:num_records]
    weights, to_train, to_heldout = _nearest(rows[:max_images], train, heldout)
    share, reference, difference = float(weights[:num_records].sum()), 0.5, weights
    if len(rest) >= num_records:
        reference_weights, _, _ = _nearest(rest, train, heldout)
        reference, difference = float(reference_weights[:num_records].sum()), weights - reference_weights
    error = float(np.sqrt(num_records / 2 * difference.var(ddof=1)))
    known = {record.tobytes() for record in train_images}
    return Memorisation(
        num_images=len(to_train),
        num_records=num_records,
        share_closer_to_training=share,
        reference_share=reference,
        standard_error=error,
        p_value=float(erfc(abs(share - reference) / error / np.sqrt(2))) if error else 1.0,
        median_distance_to_training=float(np.median(to_train)) / 255,
        median_distance_to_heldout=float(np.median(to_heldout)) / 255,
        duplicates_of_training=int((to_train == 0).sum()),
        duplicates_of_heldout=int((to_heldout == 0).sum()),
        duplicates_of_any_training=sum(image.tobytes() in known for image in images),
    )


def _shuffled_rows(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 [n, h, w, c] in random order as [n, h * w * c]."""
    return images[rng.permutation(len(images))].reshape(len(images), -1)


def _nearest(rows: np.ndarray, train: np.ndarray, heldout: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Share of the rows [n, d] that each record is nearest to, [2m], training first; distances to either side, [n].

    Squared distances of whole numbers are whole numbers, exact in float64: duplicates are at 0, and ties are ties.
    """
    rows, train, heldout = (part.astype(np.float64) for part in (rows, train, heldout))
    nearest_train, to_train = pairwise_distances_argmin_min(rows, train)
    nearest_heldout, to_heldout = pairwise_distances_argmin_min(rows, heldout)
    closer = (1 + np.sign(to_heldout - to_train)) / 2
    counts = [
        np.bincount(nearest_train, weights=closer, minlength=len(train)),
        np.bincount(nearest_heldout, weights=1 - closer, minlength=len(heldout)),
    ]
    return np.concatenate(counts) / len(rows), to_train, to_heldout

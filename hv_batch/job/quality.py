"""The scores of a video's pixels, and what they say about it. Score only: nothing is removed because of a score.

A decoder computes the scores (`hv_batch.media.frame_scores`), the commit record holds them, and tables, `status` and
the report show them. The thresholds below are not part of any identity: they decide words, not pixels.
"""

from __future__ import annotations

from collections.abc import Mapping

# The columns, with their meaning. Luma is that of BT.601, 0 (black) to 255 (white).
SCORES: Mapping[str, str] = {
    "luma_mean": "mean luma of all frames",
    "luma_spread": "standard deviation of luma over all pixels of all frames",
    "clipped_share": "share of pixels with a luma of at most 4 or at least 251",
    "still_share": "share of frames that are nearly identical to the one before; 0 for an image",
    "motion_energy": "mean squared change of luma from one frame to the next; 0 for an image",
}

# Limited-range video calls 16 black and 235 white. A dark scene has lights, and a bright one has shadows: both have
# more spread than an empty frame.
BLACK_MEAN, WHITE_MEAN, EMPTY_SPREAD = 16.0, 235.0, 8.0
FLAT_SPREAD = 3.0  # one brightness, with the noise of a decoder; colours of equal luma are not distinguished
STILL_SHARE = 0.95  # the first frames of a video may differ because the VAE encodes frame 0 alone

# What a video may look like, with the words of a summary. One video has one look.
LOOKS: Mapping[str, str] = {
    "black": "look black",
    "white": "look white",
    "flat": "have one brightness",
    "still": "do not move",
}
GOOD = "ok"  # the look of all other scored videos


def look(scores: Mapping[str, float], num_frames: int) -> str:
    """The first of `LOOKS` that the scores show, or GOOD. An image is never still."""
    mean, spread = scores["luma_mean"], scores["luma_spread"]
    if spread <= EMPTY_SPREAD and mean <= BLACK_MEAN:
        return "black"
    if spread <= EMPTY_SPREAD and mean >= WHITE_MEAN:
        return "white"
    if spread <= FLAT_SPREAD:
        return "flat"
    return "still" if num_frames > 1 and scores["still_share"] >= STILL_SHARE else GOOD


def describe_looks(counts: Mapping[str, int]) -> str:
    """One line for `counts` of looks, such as "12 of 2,000 videos look black, 3 do not move"; empty without scores."""
    total = sum(counts.values())
    found = [f"{counts[name]:,} {words}" for name, words in LOOKS.items() if counts.get(name)]
    if not total:
        return ""
    if not found:
        return f"none of {total:,} videos looks black, white, of one brightness or still"
    first, *rest = found
    number, _, words = first.partition(" ")
    return ", ".join([f"{number} of {total:,} videos {words}", *rest])

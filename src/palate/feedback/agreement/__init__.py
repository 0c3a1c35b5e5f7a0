"""How far people agree beyond chance: kappa for two or for exchangeable raters, alpha for everything else.

Which one: two named raters and categories, ``cohen_kappa``; the same number of unnamed raters for each item,
``fleiss_kappa``; anything with missing answers, or ratings, rankings, sets and spans, ``krippendorff_alpha``.
"""

from palate.feedback.agreement.alpha import krippendorff_alpha
from palate.feedback.agreement.distances import kendall_distance, masi_distance, span_distance
from palate.feedback.agreement.kappa import cohen_kappa, fleiss_kappa, pairwise_kappa
from palate.feedback.agreement.table import Agreement, RatingTable, rating_table

__all__ = [
    "Agreement",
    "RatingTable",
    "cohen_kappa",
    "fleiss_kappa",
    "kendall_distance",
    "krippendorff_alpha",
    "masi_distance",
    "pairwise_kappa",
    "rating_table",
    "span_distance",
]

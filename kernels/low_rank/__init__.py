"""What quantisation left out of a block, as thin factors, and reading through them."""

from kvtool.kernels.low_rank.reference import low_rank, low_rank_scores, low_rank_sums

__all__ = ["low_rank", "low_rank_scores", "low_rank_sums"]

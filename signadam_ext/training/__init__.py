"""Ways to train: gradients released inside backward, variances over the samples of a batch."""

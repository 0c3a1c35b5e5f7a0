"""Evidence: intervals, paired comparisons, diversity of text, and how good a reward model is."""

"""Many settings of one method, each an ordinary run, and one picture of what they earned for the distance they went."""

"""Text to records to batches: ``records`` reads and writes, ``chat`` tokenises, ``collate`` batches.

Records of a public shape are converted in ``formats``, one short file each. Nothing is dropped without a count.
"""

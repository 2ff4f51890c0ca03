"""Sizes that layouts and policy share. No torch in here."""

PAGE_SIZE = 64  # tokens of one cache page
FP8_BLOCK = 128  # rows, columns and channels that share one FP8 scale

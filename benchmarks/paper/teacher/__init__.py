"""A check of the idea itself: a teacher whose increment has another rank in each matrix, and who finds those ranks."""

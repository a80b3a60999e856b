"""Work of the main process of a rank only: decisions, saved state, and the check that all ranks agree.

Nothing here knows a trainer or a torch `DataLoader`.
"""

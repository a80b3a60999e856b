"""What only the main process of a rank does: decisions, saved state, and the check that all ranks agree.

Nothing here knows a trainer or a torch `DataLoader`.
"""

"""What one process needs to read samples: a rank's main process or a torch data worker.

Picklable as a whole, and ignorant of policies: decisions arrive as ledger entries through the mailbox.
"""

"""Reading samples in one process: the main process of a rank, or a torch data worker.

Everything here is picklable and knows nothing of policies: a data worker receives decisions as ledger entries through
the mailbox.
"""

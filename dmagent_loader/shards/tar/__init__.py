"""The tar format: one pass over a file finds its members and every gap between them.

Damage is loud: a zeroed header or a cut at a record boundary is reported, never taken for the end of the file.
"""

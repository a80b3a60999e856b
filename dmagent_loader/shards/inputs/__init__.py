"""Documents from the data that people have: which files are read, how each kind is read, and what is refused.

`finding` lists the inputs of a domain, `pieces` divides them into units of work, and `reading` yields their records,
which `documents` turns into text.
"""

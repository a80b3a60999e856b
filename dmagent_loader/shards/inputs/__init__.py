"""Documents from the data that people have: which files are read, how each kind is read, and what is refused.

`finding` lists the inputs of a domain, `pieces` divides them into units of work, `text`, `tables` and `archives` read
their records, and `documents` makes texts of these.
"""

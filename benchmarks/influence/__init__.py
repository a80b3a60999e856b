"""What influence is worth: policies compared on many question sets, and the ways of measuring it."""

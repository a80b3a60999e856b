"""Analysis of trained agents: trials on proxies, noise of feedback, fidelity of proxies, coverage of a record."""

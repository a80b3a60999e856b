"""Offline training of agents: corpus, trajectories, proxies, feedback, supervised warm-up, Conservative Q-Learning.

The stages follow the paper (sections 3.2, 3.3 and C). Only the command line imports this package; the loader does not.
"""

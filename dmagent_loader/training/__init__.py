"""Training of agents, offline: corpus, trajectories, proxies, feedback, supervised warm-up, Conservative Q-Learning.

The stages follow the paper (sections 3.2, 3.3 and C). Nothing in the loader imports this package; only the command
line does.
"""

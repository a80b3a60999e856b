"""The offline pipeline that trains agents: corpus, trajectories, proxies, feedback, training (design section 8).

Nothing in the loader imports this package; only the command line does.
"""

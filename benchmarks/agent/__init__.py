"""Analysis of trained agents: trials of policies, noise of feedback, fidelity of proxies, coverage of a recorded set.

Programs, run as ``python -m benchmarks.agent.NAME``: acts_well, agent_search, batched_proxies, feedback_noise,
plus_ablation, plus_front, plus_offline, plus_validation, proxy_fidelity, record_card.
"""

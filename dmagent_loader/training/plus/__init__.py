"""Training of `dmagent-plus`: a surrogate of runs, evolution strategies, offline reinforcement learning."""

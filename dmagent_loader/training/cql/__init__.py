"""Conservative Q-Learning on the simplex (paper, C.4): settings, rewards, algorithm, training."""

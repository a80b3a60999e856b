"""Conservative Q-Learning on the simplex (paper, C.4): rewards, algorithm, training."""

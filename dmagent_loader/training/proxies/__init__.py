"""Small proxy models: pre-trained bases, training along trajectories, feedback from question sets."""

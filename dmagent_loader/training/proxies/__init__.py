"""Small proxy models: pre-trained bases, training along trajectories, feedback on question sets."""

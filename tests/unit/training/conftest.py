from training_fixtures import bases, collected, corpus, inputs, questions, small, states, trajectories

__all__ = ["bases", "collected", "corpus", "inputs", "questions", "small", "states", "trajectories"]

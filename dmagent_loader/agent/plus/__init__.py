"""The network of `dmagent-plus`, for any number of domains with any names: observation, network, checkpoint.

numpy only, except for the checkpoint: a decision takes milliseconds on a CPU and needs no torch module.
"""

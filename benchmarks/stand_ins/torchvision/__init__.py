"""Stands in for torchvision in the environment of mosaicml-streaming, which imports two names of it for image datasets.

The registry's build of torchvision wants CUDA.
"""

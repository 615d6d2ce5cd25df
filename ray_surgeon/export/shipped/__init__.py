"""Modules that are copied beside the weights of an export; they import torch and transformers only."""

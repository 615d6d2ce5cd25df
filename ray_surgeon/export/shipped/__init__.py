"""Modules that go with an export's weights; they import torch and transformers only."""

"""Modules that are copied beside an export's weights; they import torch and transformers only."""

"""Evaluation of models on texts and on answers to prompts."""

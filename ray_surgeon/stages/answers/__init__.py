"""Answers to prompts: how near the pruned model comes to the dense one."""

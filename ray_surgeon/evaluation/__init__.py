"""What models are measured on: texts, and answers to prompts."""

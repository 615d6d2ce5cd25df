"""Sections of a job spec.

Each is passed whole to the code that uses it; `ray_surgeon.config.job` puts them together.
"""

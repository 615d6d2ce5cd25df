"""Stages of a run: everything that a feature has lies at one address here."""

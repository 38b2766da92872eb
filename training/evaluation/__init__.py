"""Evaluation: image metrics, recognisers, intervals and tables."""

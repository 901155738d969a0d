"""Runs become a comparison: numbers, page, figures."""

"""Runs and layouts that several test modules share; ranks import these modules by name."""

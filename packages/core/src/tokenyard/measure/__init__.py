"""Measure time, kernel launches and memory of calls on one device."""

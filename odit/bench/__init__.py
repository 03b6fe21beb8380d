"""Measurements, a module each: settings as a dataclass, and a function that prints a JSON object a row."""

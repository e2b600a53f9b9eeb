"""Task definitions and runners. None yet: `examples/demo.py` evaluates until they come."""

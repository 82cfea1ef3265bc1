"""What runs on a vCPU: the worker itself, its guests and probes. Imports nothing of hostpart."""

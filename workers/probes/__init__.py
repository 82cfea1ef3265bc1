"""Workloads for a vCPU, one a module; usable as python guests."""

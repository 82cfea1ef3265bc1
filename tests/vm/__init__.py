"""Tests inside virtual machines: what would move, pin or stop others' processes happens only there."""

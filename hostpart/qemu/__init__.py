"""Guests that are operating systems: QEMU's process, its vCPU threads, and what the guest is told of its machine.

Nothing here is imported for other guests. :mod:`~hostpart.qemu.machine` is the one process, the rest are its parts.
"""

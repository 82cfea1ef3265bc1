"""Partition experiments: what sharing costs on this host, and whether the partition held while it was measured.

A design (``design.py``) says what is tried; ``sharing.py`` says what degrees of sharing the host has; ``schedule.py``
puts the runs into order; ``runner.py`` makes them, each a VM like any other; ``results.py`` is the directory they are
kept in; ``facts.py`` is the host they were made on; ``analysis.py`` says, with ``statistics.py``, what they show, from
what ``intake.py`` can read of the runs and ``starts.py`` of the starts; ``pooled.py`` says what several hosts show
together.
"""

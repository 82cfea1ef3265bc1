"""Many hosts: the same partitions and experiments on a cluster that Dask's ``distributed`` connects.

On a host: ``agent.py`` is loaded into its Dask worker and says what the host has (``supply.py``, ``identity.py``);
``errand.py`` is one request there, a directory and a process of its own that outlives the worker. At the user's side:
``cluster.py`` is the connection, ``roster.py`` the hosts that are there, ``request.py`` what is asked of one,
``dispatch.py`` the way of requests to hosts and back, ``journal.py`` the directory in which what they say is kept.
"""

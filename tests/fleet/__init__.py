"""Many hosts in one: real ones in namespaces of their own, and simulated ones by the thousand."""

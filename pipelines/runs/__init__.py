"""A run: its stages as units of work, the cluster it needs, and its report."""

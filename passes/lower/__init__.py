"""From a plan to a graph: live-range attention in the sites' places."""

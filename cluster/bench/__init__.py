"""How much a cluster costs, and what it loses."""

"""How long a step takes: calls that are measured by themselves, and added up."""

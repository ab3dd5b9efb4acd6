"""Commands beside the compile: what it will take, what a scheme costs, and how much memory it needs."""
